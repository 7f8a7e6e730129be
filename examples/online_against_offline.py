"""Online DPO against offline DPO on the embedded lab: gold reward at equal reverse KL, the difference by prompt.

    python examples/online_against_offline.py                     4 betas, 3 seeds: a quarter of an hour on two cores
    python examples/online_against_offline.py betas=0.1,2 seeds=0,1 runs=FOLDER out=result.json

Options: betas=… seeds=… runs=FOLDER (a run that has ended is not trained again) out=FILE.json, and overrides of dpo_kit
for both sides. Both train on the same prompts, once each, for as many steps at the same rate, and one judge, the gold
reward, compares two answers to every prompt. Offline they are two of the start model, drawn before training, and drawn
again until their rewards differ (the embedded pairs: no comparison is lost on a tie, which favours offline); online
they are two of the policy as it is at that step. Gold reward at a KL is interpolated between the runs of neighbouring
betas, linearly in the square root of the KL, prompt by prompt.
"""

import json
import math
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dpo_kit import compose, train
from dpo_kit.judge.verdicts import toss_coin
from dpo_kit.run.files import write_json, write_jsonl
from dpo_kit.run.statistics import holm, paired_bootstrap
from dpo_kit.sweep.choice.runs import read_runs
from dpo_kit.sweep.summary import write_summary
from dpo_kit.toy import TRAIN, gold_rewards

OWN = {"betas": "0.05,0.5,1,2", "seeds": "0,1,2", "runs": "", "out": ""}
METHODS = {"offline": "dpo", "online": "online_dpo"}
LEVELS = 3
SHORT = ["tracking=none", "trl.eval_strategy=no", "trl.save_strategy=no", "callbacks.preview=[]", "callbacks.pairs=64",
         "trl.per_device_train_batch_size=32", "trl.learning_rate=4e-4"]  # fmt: skip


def main(arguments):
    given = dict(argument.split("=", 1) for argument in arguments)
    options = OWN | {key: value for key, value in given.items() if key in OWN}
    further = [f"{key}={value}" for key, value in given.items() if key not in OWN]
    folder = Path(options["runs"] or tempfile.mkdtemp())
    data = folder / "pairs.jsonl"
    coins = label_pairs(data)
    betas, seeds = (options[name].split(",") for name in ("betas", "seeds"))
    for seed in seeds:
        for beta in betas:
            for name, method in METHODS.items():
                words = [f"method={method}", f"beta={beta}", f"seed={seed}", f"data.train={data}", *SHORT, *further]
                train(compose(words), folder / f"{name}-beta{beta}-seed{seed}")
    runs = [run for run in read_runs(folder) if run.finished]
    budget = {"offline": {"comparisons": sum(1 for _ in data.open()), "coins": coins}, "online": judged(runs)}
    found = {"runs": [describe(run) for run in runs], "budget": budget, "levels": compare(runs, [*map(float, seeds)])}
    write_summary(folder)
    show(found, folder)
    if options["out"]:
        write_json(Path(options["out"]), found)


def label_pairs(file):
    """The embedded pairs, labelled anew by the gold reward, so that both sides have one judge; coins that it took."""
    rows, coins = [json.loads(line) for line in TRAIN.read_text().splitlines()], 0
    for row in rows:
        answers = sorted((row["chosen"], row["rejected"]), key=lambda answer: answer[-1]["content"])
        first, second = gold_rewards(2 * [row["prompt"]], [answer[-1]["content"] for answer in answers])
        coins += first == second
        first_wins = toss_coin(0, row["prompt"], answers) if first == second else first > second
        row["chosen"], row["rejected"] = answers if first_wins else answers[::-1]
    kept = ({name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows)
    if not file.exists():
        write_jsonl(file, kept)
    return coins


def judged(runs):
    """Comparisons of one online run, and coins, of all of them on average."""
    each = [json.loads((run.root / "result.json").read_text())["judge"] for run in side(runs, "online")]
    coins = sum(sum(one["coins"].values()) for one in each) / len(each)
    return {"comparisons": each[0]["comparisons"], "coins": round(coins)}


def side(runs, name):
    return [run for run in runs if run.method == METHODS[name]]


def describe(run):
    gold = {end: run.measured.get(f"gold/reward{end}") for end in ("", "_low", "_high")}
    return {"method": run.method, "beta": run.beta, "seed": run.seed, "kl_reverse_nats": run.kl_reverse,
            **{f"gold_reward{end}": value for end, value in gold.items()}, "seconds": run.seconds}  # fmt: skip


# --- at equal KL -------------------------------------------------------------------------------------------------


def compare(runs, seeds):
    """At each of some KLs that every line reaches: gold reward of either side, and online less offline."""
    lines = {(name, seed): frontier(runs, name, seed) for name in METHODS for seed in seeds}
    low = max(line[1][0] for line in lines.values())
    high = min(line[-1][0] for line in lines.values())
    if low >= high:
        return []
    levels = [difference_at(kl, lines, seeds) for kl in np.linspace(math.sqrt(low), math.sqrt(high), LEVELS) ** 2]
    for level, p in zip(levels, holm([level["p"] for level in levels]), strict=True):
        level["p_holm"] = p
    return levels


def frontier(runs, name, seed):
    """(reverse KL, gold reward by prompt) of the start and of each beta, by rising KL."""
    own = [run for run in side(runs, name) if run.seed == seed]
    start = (0.0, own[0].gold_by_prompt(at_start=True))
    return [start, *sorted(((run.kl_reverse, run.gold_by_prompt()) for run in own), key=lambda point: point[0])]


def reward_at(kl, line):
    """Gold reward by prompt where the line passes `kl`."""
    below, above = next(pair for pair in pairwise(line) if kl <= pair[1][0] * (1 + 1e-12))
    share = (math.sqrt(kl) - math.sqrt(below[0])) / (math.sqrt(above[0]) - math.sqrt(below[0]))
    return {prompt: (1 - share) * below[1][prompt] + share * value for prompt, value in above[1].items()}


def difference_at(kl, lines, seeds):
    """Online less offline at `kl`: mean over seeds with its interval by prompt, and by prompt and seed."""
    rewards = {key: reward_at(kl, line) for key, line in lines.items()}
    prompts = sorted(rewards["online", seeds[0]])
    mean = {
        name: {prompt: float(np.mean([rewards[name, seed][prompt] for seed in seeds])) for prompt in prompts}
        for name in METHODS
    }
    test = paired_bootstrap(mean["online"], mean["offline"])
    gaps = np.array([[rewards["online", s][p] - rewards["offline", s][p] for p in prompts] for s in seeds])
    low, high = resample_both(gaps)
    return {"kl_reverse_nats": float(kl), **{name: float(np.mean([*mean[name].values()])) for name in METHODS},
            "difference": test.value, "low": test.low, "high": test.high, "p": test.p, "prompts": len(prompts),
            "low_with_seeds": low, "high_with_seeds": high, "by_seed": gaps.mean(1).tolist()}  # fmt: skip


def resample_both(gaps, draws=10_000):
    """95 % interval of the mean of (seeds, prompts), both resampled: with few seeds a rough one."""
    generator, (seeds, prompts) = np.random.default_rng(0), gaps.shape
    means = [
        gaps[generator.integers(seeds, size=seeds)][:, generator.integers(prompts, size=prompts)].mean()
        for _ in range(draws)
    ]
    return [float(end) for end in np.quantile(means, [0.025, 0.975])]


# --- what is shown -----------------------------------------------------------------------------------------------


def show(found, folder):
    console = Console(width=110)
    console.print(run_table(found["runs"]))
    for name, budget in found["budget"].items():
        said = (
            f"{name}: {budget['comparisons']:,} judged comparisons a run, {budget['coins']:,} of them decided by coin"
        )
        console.print(said, highlight=False)
    if found["levels"]:
        console.print(level_table(found["levels"]))
    console.print(verdict(found["levels"]), highlight=False)
    console.print(f"picture: {folder / 'frontier.png'}", highlight=False, soft_wrap=True)


def run_table(runs):
    table = Table(
        "method", "beta", "runs", "reverse KL, nats", "gold reward", title="means over seeds", title_justify="left"
    )
    for method, beta in sorted({(run["method"], run["beta"]) for run in runs}):
        own = [run for run in runs if (run["method"], run["beta"]) == (method, beta)]
        values = [np.mean([run[key] for run in own]) for key in ("kl_reverse_nats", "gold_reward")]
        table.add_row(method, f"{beta:g}", str(len(own)), *(f"{value:.2f}" for value in values))
    return table


def level_table(levels):
    columns = ("reverse KL, nats", *METHODS, "online − offline", "95 %, prompts", "95 %, prompts and seeds", "p (Holm)")
    table = Table(*columns, title="gold reward at equal KL", title_justify="left")
    for level in levels:
        ends = [(level["low"], level["high"]), (level["low_with_seeds"], level["high_with_seeds"])]
        values = (f"{level[name]:.2f}" for name in METHODS)
        intervals = (f"[{low:+.2f}, {high:+.2f}]" for low, high in ends)
        table.add_row(
            f"{level['kl_reverse_nats']:.2f}",
            *values,
            f"{level['difference']:+.2f}",
            *intervals,
            f"{level['p_holm']:.4f}",
        )
    return table


def verdict(levels):
    """What the intervals allow to say, a null result included."""
    if not levels:
        return "No KL is reached by both sides at every seed: take other betas."
    sides = {1: "online is higher", -1: "offline is higher", 0: "not told apart"}
    said = []
    for level in levels:
        ends = (level["low_with_seeds"], level["high_with_seeds"])
        sign = 0 if ends[0] <= 0 <= ends[1] or level["p_holm"] > 0.05 else int(math.copysign(1, level["difference"]))
        said.append(f"{sides[sign]} at {level['kl_reverse_nats']:.2f} nats")
    return f"{'; '.join(said)}.".capitalize()


if __name__ == "__main__":
    main(sys.argv[1:])
