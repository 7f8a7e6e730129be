"""How fast preference data are checked, and in how much memory.

    python examples/benchmark/data.py [pairs=100000 out=FOLDER]

Synthetic pairs, 20 words a prompt and 60 an answer on average, 2 in 100 of them near-duplicates of another one, go
through `python -m dpo_kit data`: strict reading, token counts with the embedded model's tokenizer, near-duplicates,
leaks, clusters, shortcuts, table and picture; no model pass. The rate is for the whole command, imports in.
"""

import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

LETTERS, WEIGHTS = "etaoinshrdlcumwfgypbvk", (12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1)
VOCABULARY = 20_000


def main(arguments):
    options = {"pairs": "100000", "out": ""} | dict(argument.split("=", 1) for argument in arguments)
    folder = Path(options["out"] or tempfile.mkdtemp())
    file, count = folder / "pairs.jsonl", int(options["pairs"])
    write_pairs(file, count)
    load = os.getloadavg()[0]
    seconds, memory = check(file, folder / "report")
    report = json.loads((folder / "report" / "data_report.json").read_text())
    table = Table("measure", "value", title=f"python -m dpo_kit data on {os.cpu_count()} cores, load before {load:.1f}")
    table.add_row("pairs", f"{count:,}")
    table.add_row("size of the file, MB", f"{file.stat().st_size / 1e6:.0f}")
    table.add_row("seconds", f"{seconds:.1f}")
    table.add_row("pairs a second", f"{count / seconds:,.0f}")
    table.add_row("peak memory, GiB", f"{memory:.2f}")
    table.add_row("near-duplicates found of those planted", f"{report['near_duplicates']['rows']:,} of {count // 50:,}")
    Console(width=100).print(table)


def write_pairs(file, count):
    """Words of Zipf's frequencies; every fiftieth row a near-duplicate of the one before."""
    rng = random.Random(0)
    made = {"".join(rng.choices(LETTERS, WEIGHTS, k=max(1, round(rng.gauss(6, 2))))) for _ in range(VOCABULARY)}
    words = sorted(made, key=lambda word: (len(word) + rng.random() * 6, word))
    weights = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))

    def text(low, high):
        return " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(low, high)))

    file.parent.mkdir(parents=True, exist_ok=True)
    row = {}
    with file.open("w") as out:
        for number in range(count):
            if number % 50 == 49:
                row = row | {"chosen": row["chosen"].replace(" ", "  ", 1).upper()}
            else:
                row = {"prompt": text(8, 32) + "?", "chosen": text(20, 100) + ".", "rejected": text(20, 100) + "."}
            out.write(json.dumps(row) + "\n")


def check(file, out):
    """(seconds, GiB) of the command."""
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    words = ["data=jsonl", f"data.train={file}", "trl.max_length=1024", f"out={out}"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dpo_kit", "data", *words], check=True, env=env, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


if __name__ == "__main__":
    main(sys.argv[1:])
