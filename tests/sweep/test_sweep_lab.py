"""What whole sweeps of the embedded lab show: beta binds, a hacked proxy shows, and the choice avoids it."""

import csv
import json
import math
import statistics

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
FIGURES = (
    "beta",
    "kl_reverse_nats",
    "kl_reverse_nats_se",
    "accuracy",
    "accuracy_low",
    "gold_reward",
    "gold_reward_high",
)


def rows(folder):
    with (folder / "summary.csv").open() as file:
        return [{key: float(row[key]) for key in FIGURES} for row in csv.DictReader(file)]


def sweep(command, folder, *words):
    done = command(*words, "tracking=none", f"hydra.sweep.dir={folder}", "callbacks.preview=[]", timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    return rows(folder), json.loads((folder / "best.json").read_text())


def test_the_drift_falls_with_beta_as_a_trend_over_three_seeds(command, tmp_path):
    found, _ = sweep(command, tmp_path / "swept", "beta-sweep=standard", "seed=0,1,2")
    assert len(found) == 12
    x, y = ([math.log(row[key]) for row in found] for key in ("beta", "kl_reverse_nats"))
    assert statistics.linear_regression(x, y).slope < -0.1
    means = {
        beta: statistics.fmean(row["kl_reverse_nats"] for row in found if row["beta"] == beta) for beta in (0.05, 0.5)
    }
    errors = {
        beta: math.hypot(*(row["kl_reverse_nats_se"] for row in found if row["beta"] == beta)) / 3 for beta in means
    }
    assert means[0.05] - 1.96 * errors[0.05] > means[0.5] + 1.96 * errors[0.5]


def test_biased_raters_raise_the_proxy_and_not_the_gold_and_the_choice_avoids_it(command, tmp_path):
    found, best = sweep(command, tmp_path / "swept", "-m", "data=toy_biased", "beta=0.05,0.5")
    hacked, kept = found
    assert hacked["accuracy_low"] > 0.5 and hacked["gold_reward_high"] < kept["gold_reward"]
    start = json.loads((tmp_path / "swept" / "dpo-beta0.05-seed0" / "result.json").read_text())["start"]
    assert hacked["gold_reward"] < start["gold/reward"]
    assert best["recommended"] == "dpo-beta0.5-seed0"
