"""Best-of-n of the reference: against every choice of n answers, exact drifts, and what a sweep says of it."""

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy
import pytest

from dpo_kit.sweep.choice.best_of import FILE, as_good_as, best_of_n, drift_bound, win_rates_of_best_of
from dpo_kit.sweep.summary import describe, summarize, write_summary
from tests.sweeps import rewards, write_run


def test_the_best_of_n_is_the_mean_over_every_choice_of_n_answers():
    scores = numpy.random.default_rng(0).normal(size=(5, 6)).round(1).tolist()  # with ties
    for point in best_of_n(scores):
        every = [fmean(max(chosen) for chosen in combinations(row, point.n)) for row in scores]
        assert point.value == pytest.approx(fmean(every))
        assert point.low <= point.value <= point.high
    picked = {point.n: point.value for point in best_of_n([[float(place) for place in range(64)]])}
    assert picked[1] == pytest.approx(31.5) and picked[2] == pytest.approx(65 * 2 / 3 - 1)


def test_the_drift_is_at_most_the_bound_and_is_it_where_no_two_answers_score_the_same():
    for n in (1, 2, 4, 16):
        for answers, alike in ((4, False), (4000, True)):
            ranks = numpy.arange(1, answers + 1)
            best = (ranks**1.0 / answers) ** n - ((ranks - 1.0) / answers) ** n  # uniform answers, no two alike
            drift = float((best * numpy.log(numpy.maximum(best * answers, 1e-300))).sum())
            assert drift <= drift_bound(n) + 1e-9
            assert not alike or drift == pytest.approx(drift_bound(n), abs=0.01)


def test_the_win_rate_of_best_of_n_is_that_of_a_simulation():
    drawn = numpy.random.default_rng(0).normal(size=(40_000, 5))
    for point in win_rates_of_best_of(4):
        won = (drawn[:, : point.n].max(1) > drawn[:, 4]).mean()
        assert point.value == pytest.approx(won, abs=0.01)


def test_a_policy_is_as_good_as_the_highest_that_it_reaches():
    points = win_rates_of_best_of(8)
    assert as_good_as(0.6, points) == ("not better than", points[1])
    assert as_good_as(0.7, points)[1].n == 2 and as_good_as(0.75, points) == ("at least as good as", points[2])
    assert as_good_as(0.95, points) == ("at least as good as", points[7])
    assert as_good_as(0.85, [points[0], points[1], points[3], points[7]]) == ("at least as good as", points[3])


def _sweep(folder: Path, mean: float) -> Path:
    for name, beta, kl in (("near", 0.5, 2.0), ("far", 0.05, 9.0)):
        write_run(folder, name, beta=beta, gold=rewards(mean), gold_start=rewards(1.0, seed=1), kl=kl)
    points = best_of_n(numpy.random.default_rng(0).normal(1, 1, size=(200, 8)).tolist())
    (folder / FILE).write_text(json.dumps({"points": [vars(point) for point in points]}))
    return folder


@pytest.mark.parametrize(
    ("mean", "said"),
    [(1.3, "not better than best of 2"), (2.0, "at least as good as best of"), (3.5, "at least as good as best of 8")],
)
def test_a_sweep_says_what_its_choice_is_beside_best_of_n(tmp_path, mean, said):
    folder = _sweep(tmp_path, mean)
    summary = write_summary(folder)
    (line,) = [line for line in describe(summary) if "best of" in line]
    assert line.startswith(f"near is {said}") and line in (folder / "summary.md").read_text()
    assert ("Look at the data" in line) == (mean == 1.3)
    listed = json.loads((folder / "best.json").read_text())["best_of_n_of_the_reference"]
    assert [point["n"] for point in listed] == list(range(1, 9))
    assert listed[3]["kl"] == pytest.approx(math.log(4) - 3 / 4)


def test_without_answers_of_the_reference_nothing_is_said_of_best_of_n(tmp_path):
    folder = _sweep(tmp_path, 2.0)
    (folder / FILE).unlink()
    assert not any("best of" in line for line in describe(summarize(folder)))
