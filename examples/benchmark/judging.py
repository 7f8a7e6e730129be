"""How far win rates can be trusted, in simulation: judges that err, put right by people; verdicts that end early.

    python examples/benchmark/judging.py [simulations=1000] [out=FILE]

First table: a judge of 80 % accuracy, 256 comparisons of which people judge 100; how often the 95 % interval of the
judge's own rate, and of the rate put right by people, holds the true one. Second: verdicts that are asked for until
the rate is settled, 256 at most; what is said, and what share of the verdicts is spared.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dpo_kit.evaluate.sequential import ConfidenceSequence
from dpo_kit.evaluate.win_rate import Compared, ask, win_rates
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.verdicts import Judge

COMPARISONS, REVIEWED, ACCURACY, WITHIN = 256, 100, 0.8, 0.05
RATES = ((0.5, 0.0), (0.5, 0.4), (0.6, 0.0), (0.7, 0.2), (0.85, 0.1))  # of wins among what is no tie; of ties
RAW = {1.0: ("first", "second"), 0.0: ("second", "first"), 0.5: ("tie", "tie")}


class Given(Judge):
    """A judge whose points on each prompt are known beforehand."""

    def __init__(self, points):
        self.points = points

    def decide(self, shown):
        return [raw for each in shown[::2] for raw in RAW[self.points[each.prompt]]]


def main(arguments):
    options = dict(argument.split("=", 1) for argument in arguments)
    simulations, generator = int(options.get("simulations", 1000)), np.random.default_rng(0)
    corrected = [review(generator, *rate, simulations) for rate in RATES]
    sequential = [look(generator, *rate, simulations) for rate in RATES]
    if "out" in options:
        Path(options["out"]).write_text(json.dumps({"corrected": corrected, "sequential": sequential}, indent=2) + "\n")
    for rows in (corrected, sequential):
        table = Table(*rows[0], box=MARKDOWN)
        for row in rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        Console(width=160).print(table)


def draw(generator, rate, ties):
    """Points of a win rate of ties/2 + (1 − ties) · rate."""
    won = (generator.random(COMPARISONS) < rate).astype(float)
    return np.where(generator.random(COMPARISONS) < ties, 0.5, won)


def unjudged():
    answer = Answer("an answer", False, "model")
    return [Compared(str(index), str(index), 0, answer, answer) for index in range(COMPARISONS)]


def review(generator, rate, ties, simulations):
    """How often the intervals of a judge's rate, and of the rate put right, hold the true one."""
    true, held, width = ties / 2 + (1 - ties) * rate, Counter(), 0.0
    for _ in track(range(simulations), transient=True):
        truth, rows = draw(generator, rate, ties), unjudged()
        wrong = np.where(truth == 0.5, generator.integers(2, size=COMPARISONS), 1 - truth)
        says = np.where(generator.random(COMPARISONS) < ACCURACY, truth, wrong)
        ask(Given({row.prompt: points for row, points in zip(rows, says, strict=True)}), rows, None, seed=0, within=0)
        for index in generator.permutation(COMPARISONS)[:REVIEWED]:
            rows[index].vote = float(truth[index])
        found = win_rates(rows, 500)
        for key in ("win_rate", "win_rate_corrected"):
            held[key] += found[f"{key}_low"] <= true <= found[f"{key}_high"]
        width += found["win_rate_corrected_high"] - found["win_rate_corrected_low"]
    names = {"win_rate": "judge's interval holds it", "win_rate_corrected": "put right, holds it"}
    shares = {name: held[key] / simulations for key, name in names.items()}
    return {"true rate": true, "ties": ties} | shares | {"width": width / simulations}


def look(generator, rate, ties, simulations):
    """What is said of verdicts that end early, and the share of them that is spared."""
    true, said, spared = ties / 2 + (1 - ties) * rate, Counter(), 0
    for _ in track(range(simulations), transient=True):
        rows, sequence = unjudged(), ConfidenceSequence()
        judge = Given({row.prompt: points for row, points in zip(rows, draw(generator, rate, ties), strict=True)})
        names = ask(judge, rows, sequence, seed=0, within=WITHIN)
        found = win_rates([row for row in rows if row.prompt_id in names], 500, sequence=sequence, within=WITHIN)
        said[found["win_rate_verdict"]] += 1
        spared += COMPARISONS - len(names)
    shares = {name: said[name] / simulations for name in ("better", "worse", f"within ±{WITHIN:g}", "not separated")}
    return {"true rate": true, "ties": ties} | shares | {"verdicts spared": spared / simulations / COMPARISONS}


if __name__ == "__main__":
    main(sys.argv[1:])
