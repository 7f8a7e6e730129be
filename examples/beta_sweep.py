"""Which beta? A sweep, its frontier, and how a script reads what it chose.

    python examples/beta_sweep.py

It types `python -m dpo_kit -m beta=0.05,0.1,0.5 …` and reads `best.json` and `summary.csv` of the sweep's folder;
`frontier.png` beside them draws the gold reward of each run against its KL. Expect a run to be recommended
(the one that drifts least of those that the data cannot tell from the best), and

    KL reverse at beta 0.05    4.41 ± 0.80
    KL reverse at beta 0.1     2.97 ± 0.60
    KL reverse at beta 0.5     1.87 ± 0.40
    gold reward at beta 0.05   1.88 ± 0.25
    gold reward at beta 0.1    2.18 ± 0.20
    gold reward at beta 0.5    2.10 ± 0.20
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path("outputs/betas")


def main():
    words = ["-m", "beta=0.05,0.1,0.5", "tracking=none", f"hydra.sweep.dir={FOLDER}"]
    subprocess.run([sys.executable, "-m", "dpo_kit", *words], check=True)
    with (FOLDER / "summary.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    for name, key in (("KL reverse", "kl_reverse_nats"), ("gold reward", "gold_reward")):
        for run in runs:
            label = f"{name} at beta {run['beta']}"
            print(f"{label:<25}  {float(run[key]):.3f}")
    best = json.loads((FOLDER / "best.json").read_text())
    step = f" at step {best['step']}" if best["step"] else ""
    print(f"\nrecommended: {best['recommended']}{step}\n{best['reason']}\npicture: {FOLDER / 'frontier.png'}")


if __name__ == "__main__":
    main()
