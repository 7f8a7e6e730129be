"""A judge's win rate put right by people's votes: against numpy's regression, by hand, and in simulation."""

import numpy
import pytest

from dpo_kit.judge.correction import LEAST, correct, could_be


def _drawn(generator, rate, ties, count, voted, right):
    """Points of a judge that is right in a share `right`, and the truth of `voted` of them, by lot."""
    truth = numpy.where(generator.random(count) < ties, 0.5, (generator.random(count) < rate).astype(float))
    points = numpy.where(generator.random(count) < right, truth, generator.choice([0, 0.5, 1], count))
    seen = generator.permutation(count) < voted
    votes = [float(value) if known else None for value, known in zip(truth, seen, strict=True)]
    return points.tolist(), votes, [str(index) for index in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_is_that_of_a_regression_of_votes_on_points(seed):
    points, votes, prompts = _drawn(numpy.random.default_rng(seed), 0.6, 0.2, 200, 80, 0.8)
    seen = [(point, vote) for point, vote in zip(points, votes, strict=True) if vote is not None]
    slope, constant = numpy.polyfit(*zip(*seen, strict=True), 1)
    found = correct(points, votes, prompts)
    assert found.value == pytest.approx(constant + slope * numpy.mean(points))
    assert (found.weight, found.prompts) == (pytest.approx(slope), 80)


@pytest.mark.parametrize(("rate", "ties", "right"), [(0.5, 0.0, 0.7), (0.6, 0.3, 0.8), (0.85, 0.1, 0.8)])
def test_the_interval_holds_the_truth_as_often_as_it_says(rate, ties, right):
    generator, held = numpy.random.default_rng(1), 0
    for _ in range(300):
        found = correct(*_drawn(generator, rate, ties, 256, 100, right))
        held += found.low <= ties / 2 + (1 - ties) * rate <= found.high
    assert 0.91 <= held / 300 <= 0.99


def test_a_biased_judge_is_put_right_and_one_that_knows_nothing_gets_no_weight():
    generator = numpy.random.default_rng(0)
    truth = (generator.random(4000) < 0.5).astype(float)
    prompts = [str(index) for index in range(4000)]
    votes = [float(value) if index < 2000 else None for index, value in enumerate(truth)]
    flatters = numpy.maximum(truth, generator.random(4000) < 0.5)  # half of the losses become wins
    assert numpy.mean(flatters) > 0.7
    assert correct(flatters.tolist(), votes, prompts).value == pytest.approx(0.5, abs=0.03)
    blind = correct((generator.random(4000) < 0.5).astype(float).tolist(), votes, prompts)
    assert abs(blind.weight) < 0.1
    assert correct([1.0] * 4000, votes, prompts).weight == 0


def test_answers_to_one_prompt_count_once():
    points, votes, prompts = _drawn(numpy.random.default_rng(2), 0.6, 0.0, 100, 60, 0.8)
    once, thrice = correct(points, votes, prompts), correct(points * 3, votes * 3, prompts * 3)
    assert once == pytest.approx(thrice)


def test_few_votes_correct_nothing_and_votes_on_everything_are_the_rate():
    assert correct([1.0] * 40, [1.0] * (LEAST - 1) + [None] * (41 - LEAST), [str(i) for i in range(40)]) is None
    votes = [float(index % 4 > 0) for index in range(40)]
    whole = correct([1 - vote for vote in votes], votes, [str(i) for i in range(40)])
    assert whole.value == pytest.approx(0.75)
    assert whole.low < 0.75 < whole.high
    same = correct([1.0] * 40, [1.0] * 40, [str(i) for i in range(40)])
    assert (same.value, same.high) == pytest.approx((1, 1))
    assert 0.85 < same.low < 1


def test_what_a_judge_of_given_accuracy_may_hide():
    assert could_be(0.6, 0.8) == pytest.approx((2 / 3, 0.4, 0.8))
    assert could_be(0.9, 0.8) == pytest.approx((1, 0.7, 1))
