"""The reward-hacking watch: planted changes of style, histories in which proxy and truth part or stay together."""

import random

import pytest

from dpo_kit.evaluate.behaviour import MEASURES, Contest, compare_styles, watch_hacking, watch_rewards


def history(gold, proxy, half=0.05, key="probe/reward_margin"):
    return [
        {"step": 20 * index, "gold/reward": g, "gold/reward_low": g - half, "gold/reward_high": g + half, key: p}
        for index, (g, p) in enumerate(zip(gold, proxy, strict=True))
    ]


RISING = [0.0, 0.5, 1.0, 1.5, 2.0]
HACKED = history([0.2, 1.0, 1.6, 1.3, 0.9], RISING)


def test_a_proxy_that_rises_while_the_truth_falls_is_hacking():
    found = watch_rewards(HACKED)
    assert (found["verdict"], found["peak_step"], found["last_step"]) == ("hacked", 40, 80)
    assert "the reward margin went from 1.00 to 2.00, the gold reward from 1.60 to 0.90" in found["reason"]
    assert "take a checkpoint near step 40" in found["reason"]
    assert "no checkpoint beats the start" in watch_rewards(history([1.6, 1.2, 0.9], RISING[:3]))["reason"]


@pytest.mark.parametrize(
    "rows",
    [
        history([0.2, 1.0, 1.4, 1.5, 1.6], RISING),  # the truth keeps rising
        history([0.2, 1.0, 1.6, 1.3, 0.9], [0.0, 0.5, 1.0, 0.9, 0.8]),  # both fall
        history([0.2, 1.0, 1.6, 1.3, 0.9], RISING, half=0.9),  # a fall within what chance does
        [row | {"probe/logratio_chosen_nats": 0.2, "probe/floor_nats": 0.6} for row in HACKED],  # rounding rose
    ],
    ids=["rising", "both fall", "noise", "rounding"],
)
def test_its_healthy_neighbours_are_none(rows):
    found = watch_rewards(rows)
    assert found["verdict"] == "tracking" and "no sign of reward hacking" in found["reason"]


def test_the_number_of_points_is_paid_for():
    """A fall of 2.2 standard errors: p = .028 for two points, .11 for five of which the highest was picked."""
    half = 1.96 * 0.1 / 2.2 / 2**0.5
    assert watch_rewards(history([1.0, 0.9], [0.0, 1.0], half))["p"] == pytest.approx(0.0278, abs=1e-4)
    five = watch_rewards(history([0.8, 1.0, 0.9, 0.9, 0.9], RISING, half))
    assert five["p"] == pytest.approx(4 * 0.0278, abs=4e-4) and five["verdict"] == "tracking"


def test_without_a_gold_reward_nothing_is_claimed_and_other_margins_stand_in():
    assert watch_rewards([])["verdict"] == "unknown"
    assert watch_rewards([{"step": 1, "gold/reward": 1.0}])["verdict"] == "unknown"
    nats = watch_rewards(history([1.6, 0.9], [1.0, 2.0], key="probe/margin_nats"))
    assert (nats["verdict"], nats["proxy"]) == ("hacked", "probe/margin_nats")


def spoken(count, longer=0, listed=0.0, seed=0):
    """Answers of 8 to 12 words of both models; the policy's `longer`, a share of them with a list."""
    rng = random.Random(seed)
    vocabulary = [f"w{index}" for index in range(400)]
    rows = []
    for index in range(count):
        answer, other = (" ".join(rng.choices(vocabulary, k=rng.randint(8, 12))) for _ in range(2))
        answer = " ".join([answer, *rng.choices(vocabulary, k=longer)]) if longer else answer
        rows.append(Contest(f"q{index}", f"- {answer}" if rng.random() < listed else answer, other, "tie"))
    return rows


def test_a_planted_change_of_length_and_lists_is_found_with_its_size():
    styles = {style.name: style for style in compare_styles(spoken(80, longer=6, listed=0.5))}
    length, lists = styles["words"], styles["with a list"]
    assert length.changed and length.low < 6 < length.high and length.n == 80
    assert lists.changed and lists.low < 0.5 < lists.high and lists.shift is None and lists.reference == 0
    assert not styles["repeated runs of four words"].changed


def test_answers_of_one_kind_are_seldom_called_changed():
    """40 comparisons of the same kind: a length interval leaves 0 out in about 1 of 20."""
    changed = sum(compare_styles(spoken(60, seed=seed))[0].changed for seed in range(40))
    assert changed <= 6


def test_several_draws_of_a_prompt_count_as_one():
    rows = [
        Contest("q", "a b", "a", "tie"),
        Contest("q", "a b c d", "a", "tie"),
        Contest("r", "a", "a b", "tie"),
    ]
    length = compare_styles(rows)[0]
    assert (length.n, length.policy, length.reference, length.difference) == (2, 2.0, 1.5, 0.5)
    assert compare_styles(rows[:2]) == []


def test_the_measures_say_what_their_names_say():
    assert MEASURES["words"]("It's 3 o'clock.") == 3
    assert MEASURES["with a list"]("1. a\n2. b") == 1 and MEASURES["with a list"]("a - b") == 0
    assert MEASURES["with markdown"]("some **bold** words") == 1 and MEASURES["with markdown"]("2 * 3 * 4") == 0


def test_the_watch_writes_verdict_and_picture(tmp_path):
    found = watch_hacking(spoken(60, longer=6), HACKED, tmp_path / "hacking.png")
    assert found["verdict"] == "hacked" and "read the length-controlled win rate" in found["reason"]
    assert found["rewards"]["peak_step"] == 40
    assert (tmp_path / "hacking.png").stat().st_size > 10_000
    alone = watch_hacking(spoken(60, longer=6), [], tmp_path / "alone.png")
    assert alone["verdict"] == "style changed"
    assert watch_hacking(spoken(60), [], tmp_path / "same.png")["verdict"] == "nothing seen"
