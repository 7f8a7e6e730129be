"""Training beside other programs on the same cores: seconds alone, beside one other torch program, and beside two.

    python examples/benchmark/crowd.py [repeats=3] [out=FILE]

Each run of dpo_kit on 160 prompt-heavy pairs (see speed.py), imports in: once as OpenMP comes, whose threads spin while
they wait for each other, and once as dpo_kit sets it, where they sleep. The other programs train a small network with
PyTorch as it comes. Medians of `repeats` runs, the kinds taken in turns.
"""

import json
import os
import statistics
import subprocess
import sys
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
KINDS = {"as OpenMP comes": {"GOMP_SPINCOUNT": "300000"}, "as dpo_kit sets it": {}}
OTHERS = (0, 1, 2)
SHAPE = "prompt-heavy"


def main(arguments):
    options = {"repeats": "3"} | dict(argument.split("=", 1) for argument in arguments)
    speed.make_model(speed.WORK / "model", "5m")
    speed.make_pairs(speed.WORK / SHAPE, *speed.SHAPES[SHAPE][:2], speed.SHAPES[SHAPE][3])
    speed.make_pairs(speed.WORK / "eval", (20, 10, 10), 0.1, 8)
    seconds = {(kind, others): [] for kind in KINDS for others in OTHERS}
    for _ in range(int(options["repeats"])):
        for (kind, others), found in seconds.items():
            found.append(timed(KINDS[kind], others))
            if "out" in options:
                rows = [{"kind": kind, "others": others, "seconds": found} for (kind, others), found in seconds.items()]
                Path(options["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("seconds of a run, median", "alone", "beside one", "beside two", box=MARKDOWN)
    for kind in KINDS:
        table.add_row(kind, *(f"{statistics.median(seconds[kind, others]):.0f}" for others in OTHERS))
    Console(width=120).print(table)


def timed(setting, others):
    """Seconds of a run with `setting` in its environment, beside so many others."""
    programs = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(others)]
    time.sleep(8 if others else 0)  # until they have imported
    os.environ.update(setting)
    try:
        return speed.ours(SHAPE)["wall"]
    finally:
        for name in setting:
            del os.environ[name]
        for program in programs:
            program.kill()
            program.wait()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
