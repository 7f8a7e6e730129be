"""The confidence sequence: its capital by hand, and what it says wrongly however often one looks."""

import math
from itertools import pairwise

import numpy
import pytest

from dpo_kit.evaluate.sequential import ConfidenceSequence, settled


def _won(values, mean):
    """The capital against one mean, written out: who bets on more, and who bets on less."""
    more = less = 1.0
    for count, value in enumerate(values, start=1):
        before = values[: count - 1]
        means = [(0.5 + sum(before[:k])) / (k + 1) for k in range(1, count)]
        variance = (0.25 + sum((x - m) ** 2 for x, m in zip(before, means, strict=True))) / count
        bet = math.sqrt(2 * math.log(2 / 0.05) / (variance * count * math.log(1 + count)))
        more *= 1 + min(bet, 0.5 / mean) * (value - mean)
        less *= 1 - min(bet, 0.5 / (1 - mean)) * (value - mean)
    return more, less


@pytest.mark.parametrize("seed", range(3))
def test_its_ends_are_where_somebody_has_won_twenty_times_the_stake(seed):
    values = numpy.random.default_rng(seed).choice([0, 0.5, 1], 60, p=[0.1, 0.2, 0.7]).tolist()
    sequence = ConfidenceSequence(0.05)
    sequence.add(values[:25])
    sequence.add(values[25:])
    ever = {
        mean: max(max(_won(values[:count], mean)) for count in range(61)) / 2 for mean in (0.3, 0.5, 0.6, 0.8, 0.95)
    }
    assert {mean for mean, won in ever.items() if won >= 20}
    for mean, won in ever.items():
        inside = sequence.low - 0.001 <= mean <= sequence.high + 0.001
        assert inside == (won < 20), (mean, won, sequence.low, sequence.high)


def test_looking_after_every_answer_is_wrong_in_at_most_one_run_of_twenty():
    generator, wrong, runs = numpy.random.default_rng(0), 0, 100
    for _ in range(runs):
        sequence = ConfidenceSequence(0.05)
        for value in generator.choice([0.0, 0.5, 1.0], 60, p=[0.3, 0.2, 0.5]):
            sequence.add([float(value)])
            if not sequence.low <= 0.6 <= sequence.high:
                wrong += 1
                break
    assert wrong <= 0.05 * runs


def test_the_interval_only_narrows_and_has_room_for_everything_at_first():
    sequence, ends = ConfidenceSequence(0.05), []
    for value in (1.0, 1.0, 0.0, 1.0, 0.5) * 20:
        ends.append((sequence.low, sequence.high))
        sequence.add([value])
    assert ends[0] == (0, 1)
    assert all(a[0] <= b[0] and b[1] <= a[1] for a, b in pairwise(ends))
    assert 0.5 < sequence.low < 0.7 < sequence.high
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        sequence.add([1.5])


def test_what_an_interval_settles():
    assert settled(0.51, 0.7, 0.05) == "better"
    assert settled(0.3, 0.49, 0.05) == "worse"
    assert settled(0.46, 0.54, 0.05) == "within"
    assert settled(0.46, 0.56, 0.05) is None
