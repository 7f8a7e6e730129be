"""Training beside other programs on the same cores: seconds alone, beside one other torch program, and beside two.

    python examples/benchmark/crowd.py [repeats=3] [pairs=64] [limit=300] [out=FILE]

Whole processes on prompt-heavy pairs (see speed.py), in fp32: stock `trl dpo`, dpo_kit with threads that wait as
OpenMP comes (they spin), and dpo_kit as it sets them (run/quiet.py). The other programs train a small network with
PyTorch as it comes. Medians of `repeats` runs, the kinds taken in turns; a run is stopped after `limit` seconds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import speed
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

NEIGHBOUR = """
import torch
net = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(8)])
inputs, optimizer = torch.randn(256, 512), torch.optim.AdamW(net.parameters())
while True:
    net(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
SHAPE = "prompt-heavy"
SPINNING = {"GOMP_SPINCOUNT": "300000"}  # OpenMP's own
KINDS = ("stock TRL", "dpo_kit, threads as OpenMP comes", "dpo_kit")
OTHERS = (0, 1, 2)


def main(arguments):
    options = {"repeats": "3", "pairs": "64", "limit": "300"} | dict(argument.split("=", 1) for argument in arguments)
    speed.make_model(speed.WORK / "model", "5m")
    speed.make_pairs(speed.WORK / SHAPE, *speed.SHAPES[SHAPE][:2], int(options["pairs"]))
    speed.make_pairs(speed.WORK / "eval", (20, 10, 10), 0.1, 8)
    seconds = {(kind, others): [] for kind in KINDS for others in OTHERS}
    for _ in range(int(options["repeats"])):
        for (kind, others), measured in seconds.items():
            words = speed.our_words(SHAPE, "trl.bf16=false")
            if kind == "stock TRL":
                words = [*speed.stock_words(SHAPE), "--bf16", "false"]
            spins = SPINNING if "OpenMP" in kind else {}
            measured.append(timed(words, os.environ | spins, others, float(options["limit"])))
            print(f"{measured[-1]:6.1f} s: {kind}, beside {others}", file=sys.stderr, flush=True)
            if "out" in options:
                rows = [{"kind": kind, "others": others, "seconds": all_} for (kind, others), all_ in seconds.items()]
                Path(options["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("seconds, median", "alone", "beside one", "beside two", box=MARKDOWN)
    for kind in KINDS:
        medians = [statistics.median(seconds[kind, others]) for others in OTHERS]
        table.add_row(kind, *(f"over {s:.0f}" if s >= float(options["limit"]) else f"{s:.0f}" for s in medians))
    Console(width=120).print(table)


def timed(words, environment, others, limit):
    """Seconds of a run with `environment`, beside so many others; `limit` if it had not ended by then."""
    programs = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(others)]
    time.sleep(10 if others else 0)  # until they have imported
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.Popen(words, cwd=speed.WORK, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            failed = run.wait(limit)
        except subprocess.TimeoutExpired:
            failed = 0
            run.kill()
            run.wait()
        finally:
            for program in programs:
                program.kill()
                program.wait()
        if failed:
            output.seek(0)
            raise SystemExit(f"{' '.join(map(str, run.args))} failed:\n{output.read()[-2000:]}")
    return min(time.perf_counter() - started, limit)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
