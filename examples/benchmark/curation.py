"""What curation is worth when 30 % of the labels are flipped: gold reward of the policy, curated against uncurated.

    python examples/benchmark/curation.py [flips=0.3 seeds=3 steps=150 out=FOLDER]

The embedded pairs with a share of their labels flipped, twice: once so that the votes show it (a flipped label has the
minority of the raters behind it), once so that nothing shows it. Each is trained on as it is and after
`python -m dpo_kit data mode=curate` with its defaults, for equal numbers of steps. The ratings, which are the gold
reward itself, are taken out of the files. Differences are of the mean gold reward of fresh samples for the held-out
prompts, with a 95 % interval of a bootstrap over prompts and seeds.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dpo_kit.toy import EVAL, TRAIN

DRAWS = 10_000


def main(arguments):
    options = {"flips": "0.3", "seeds": "3", "steps": "150", "out": ""}
    options |= dict(argument.split("=", 1) for argument in arguments)
    folder = Path(options["out"] or tempfile.mkdtemp())
    files = write_files(folder, float(options["flips"]))
    rewards = {
        name: np.stack([train(folder, name, file, seed, options["steps"]) for seed in range(int(options["seeds"]))])
        for name, file in files.items()
    }
    show(files, rewards)


def write_files(folder, share):
    """{name: file} of the sets to train on."""
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.startswith("score_")} for row in rows]
    flipped = set(random.Random(0).sample(range(len(rows)), round(share * len(rows))))
    shown = [flip(row, shows=True) if i in flipped else row for i, row in enumerate(rows)]
    hidden = [flip(row, shows=False) if i in flipped else row for i, row in enumerate(rows)]
    files = {"as they are": write(folder / "clean.jsonl", rows)}
    for name, made in (("flips, votes show them", shown), ("flips, nothing shows them", hidden)):
        file = write(folder / f"{'shown' if made is shown else 'hidden'}.jsonl", made)
        files |= {name: file, f"{name}, curated": curate(file, folder / f"curated-{file.stem}")}
    return files


def flip(row, *, shows):
    votes = 1 - row["agreement"] if shows else row["agreement"]
    return row | {"chosen": row["rejected"], "rejected": row["chosen"], "agreement": round(votes, 4)}


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def curate(file, out):
    words = ["mode=curate", "data=toy", f"data.train={file}", f"out={out}"]
    subprocess.run([sys.executable, "-m", "dpo_kit", "data", *words], check=True, stdout=subprocess.DEVNULL)
    return out / "curated.jsonl"


def train(folder, name, file, seed, steps):
    """Gold reward of one fresh sample for each held-out prompt, in the prompts' order."""
    run = folder / "runs" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    if not (run / "result.json").exists():
        words = [f"data.train={file}", f"data.eval={EVAL}", f"seed={seed}", f"trl.max_steps={steps}"]
        words += ["data=toy", "tracking=none", f"hydra.run.dir={run}"]
        command = [sys.executable, "-m", "dpo_kit", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = max(sample["step"] for sample in samples)
    ended = sorted((s for s in samples if s["step"] == last), key=lambda sample: sample["prompt_id"])
    return np.array([sample["gold_reward"] for sample in ended])


def show(files, rewards):
    table = Table("trained on", "rows", "gold reward", "curated − uncurated", "95 % interval")
    for name, file in files.items():
        difference, interval = "", ""
        if name.endswith(", curated"):
            gain = rewards[name] - rewards[name.removesuffix(", curated")]
            low, high = bootstrap(gain)
            difference, interval = f"{gain.mean():+.3f}", f"[{low:+.3f}, {high:+.3f}]"
        rows = len(file.read_text().splitlines())
        table.add_row(name, f"{rows:,}", f"{rewards[name].mean():.3f}", difference, interval)
    Console(width=110).print(table)


def bootstrap(gain):
    """95 % interval of the mean of `gain` (seeds, prompts), both drawn with replacement."""
    rng = np.random.default_rng(0)
    seeds, prompts = gain.shape
    means = [
        gain[np.ix_(rng.integers(seeds, size=seeds), rng.integers(prompts, size=prompts))].mean() for _ in range(DRAWS)
    ]
    return np.quantile(means, [0.025, 0.975])


if __name__ == "__main__":
    main(sys.argv[1:])
