"""How much gold reward the choice of a sweep gives away, over seeds.

    python examples/benchmark/regret.py [seeds=10 out=FOLDER data=toy]

For each seed a sweep of the embedded lab over the standard grid, chosen by the rule on the `select` split among the
runs and what was kept on their way. Each of these is then judged on the `test` split, which the choice has not seen;
the regret is the gold reward of the best there less that of the chosen one, and its share is of the gain that the best
has over the untrained model. Shown are the runs at their end, and the best checkpoint of all.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.trainer.held_out import measure_test_split

BETAS = (0.05, 0.1, 0.2, 0.5)


def main(arguments):
    options = {"seeds": "10", "out": "", "data": "toy"} | dict(argument.split("=", 1) for argument in arguments)
    folder = Path(options["out"] or tempfile.mkdtemp())
    console = Console(width=120)
    table = Table("seed", *(f"gold, beta {beta:g}" for beta in BETAS), "best", "chosen", "regret", "share of the gain")
    shares = []
    for seed in range(int(options["seeds"])):
        golds, start, chosen = judge(sweep(folder / f"seed{seed}", seed, options["data"]))
        best = max(golds, key=golds.get)
        regret = golds[best] - (golds[chosen] if chosen else start)
        shares.append(regret / (golds[best] - start))
        ends = (f"{golds[beta, None]:.2f}" for beta in BETAS)
        names = (f"{name(*best)}: {golds[best]:.2f}", f"{name(*chosen)}: {golds[chosen]:.2f}" if chosen else "none")
        table.add_row(str(seed), *ends, *names, f"{regret:.3f}", f"{shares[-1]:.1%}")
    console.print(table)
    error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else float("nan")
    console.print(f"mean regret: {statistics.fmean(shares):.1%} ± {1.96 * error:.1%} of the gold gain")


def name(beta, step):
    return f"{beta:g}" if step is None else f"{beta:g} at {step}"


def sweep(folder, seed, data):
    words = [f"seed={seed}", f"data={data}", "tracking=none", f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "dpo_kit", "beta-sweep=standard", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def judge(folder):
    """({(beta, step): gold reward on the test split}, that of the untrained model, the chosen (beta, step)) of a sweep;
    step None: the end of a run.
    """
    golds, starts = {}, []
    for run in sorted(path.parent for path in folder.glob("*/result.json")):
        result = read_json(run / "result.json")
        for step in (*RunDirectory(run).kept_steps(), None):
            golds[result["beta"], step] = measure_test_split(run, step)["gold/reward"]
        starts.append(result["start"]["gold/reward"])
    best = read_json(folder / "best.json")
    chosen = best["recommended"] and (read_json(folder / best["recommended"] / "result.json")["beta"], best["step"])
    return golds, statistics.fmean(starts), chosen


if __name__ == "__main__":
    main(sys.argv[1:])
