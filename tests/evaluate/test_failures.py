"""Groups of failures: each rule on a text made for it and on its nearest innocent neighbour; counts by hand."""

import json
import math
import random

import pytest

from dpo_kit.data.report.figures import is_refusal
from dpo_kit.evaluate import behaviour
from dpo_kit.evaluate.behaviour import (
    RULES,
    Contest,
    analyze_failures,
    groups_of,
    mentioned_share,
    rate_ratio,
    repeated_share,
    steps,
)

LIST = "Pack these:\n- a tent\n- a stove\n- some rope"
PROSE = "Pack a tent, a stove and some rope."
ASK = "What should I pack for the mountains?"
WORKED = "First, 3 + 4 = 7. Then double it, because there are two rows. Therefore 14 tiles."
CASES = {
    "shorter": (Contest(ASK, "A tent.", PROSE, "loss"), Contest(ASK, "A tent, a stove, rope.", PROSE, "loss")),
    "longer": (Contest(ASK, PROSE + " " + PROSE[:-1] + " too.", PROSE, "loss"), Contest(ASK, PROSE, PROSE, "loss")),
    "refusal": (
        Contest(ASK, "I'm sorry, but I can't help with that request here.", PROSE, "loss"),
        Contest(ASK, "I am sorry that your tent leaks; pack another one.", PROSE, "loss"),
    ),
    "repetition": (
        Contest(ASK, "Take a good tent. " * 3, "Take a good tent and a stove and a rope with you.", "loss"),
        Contest(ASK, "Take a good tent. " * 3, "Take a good tent. " * 3, "loss"),
    ),
    "format lost": (Contest(ASK, PROSE, LIST, "loss"), Contest(ASK, "* a tent\n* rope and a stove", LIST, "loss")),
    "reasoning dropped": (
        Contest("How many tiles?", "It takes 14 tiles in all, for both of the rows.", WORKED, "loss"),
        Contest("How many tiles?", "First 3 + 4 = 7, then twice that, so 14 tiles.", WORKED, "loss"),
    ),
    "off-topic": (
        Contest("Where is it, my kettle?", "Nice weather today, is it not?", "The kettle is repaired here.", "loss"),
        Contest("Where is it, my kettle?", "Your kettle goes to desk 3.", "The kettle is here.", "loss"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_each_rule_finds_what_it_is_for_and_leaves_its_neighbour(name):
    guilty, innocent = CASES[name]
    assert name in groups_of(guilty)
    assert name not in groups_of(innocent)


def test_an_answer_like_the_other_is_in_no_group():
    assert groups_of(Contest(ASK, PROSE, PROSE, "loss")) == ["other"]


def test_the_measures_of_texts_agree_with_a_hand():
    assert repeated_share("a b c d e a b c d") == pytest.approx(1 / 6)  # six runs of four, a b c d twice
    assert repeated_share("a b c") == 0
    assert mentioned_share("Where is the red kettle?", "A kettle.") == 0.5  # red, kettle
    assert mentioned_share("Is it?", "No.") == 1  # nothing to take up
    assert steps(WORKED) == 5  # First, 3 + 4, Then, because, Therefore
    assert steps("1. mix\n2) bake") == 2
    assert is_refusal("As an AI language model, I cannot have opinions.") and is_refusal("I won’t help you with this.")
    assert not is_refusal("You can't go wrong with a tent." + " " * 300 + "I can't help with that.")


def test_the_ratio_of_rates_is_that_of_the_textbook():
    """30 of 100 losses and 10 of 100 wins: (30.5/100.5)/(10.5/100.5) = 2.905, log spread √(1/30.5+1/10.5−2/100.5)."""
    ratio, low, high = rate_ratio(30, 100, 10, 100)
    spread = math.sqrt(1 / 30.5 + 1 / 10.5 - 2 / 100.5)
    assert ratio == pytest.approx(30.5 / 10.5)
    assert (math.log(low), math.log(high)) == pytest.approx(
        (math.log(ratio) - 1.96 * spread, math.log(ratio) + 1.96 * spread), abs=1e-3
    )
    contingency = pytest.importorskip("scipy.stats.contingency")
    theirs = contingency.relative_risk(3000, 10000, 1000, 10000).confidence_interval(0.95)
    assert rate_ratio(3000, 10000, 1000, 10000)[1:] == pytest.approx((theirs.low, theirs.high), rel=1e-3)
    assert rate_ratio(0, 0, 0, 0)[0] == 1 and rate_ratio(0, 5, 0, 5)[0] == 1


def test_the_interval_of_the_ratio_holds_what_it_promises():
    """Equal rates of .2 in 60 losses and 90 wins: about 95 % of 1,000 intervals cover 1."""
    rng = random.Random(5)
    covered = 0
    for _ in range(1000):
        lost, won = (sum(rng.random() < 0.2 for _ in range(count)) for count in (60, 90))
        _, low, high = rate_ratio(lost, 60, won, 90)
        covered += low <= 1 <= high
    assert 930 <= covered <= 985


def rows():
    """20 losses of which 15 are too long, 20 wins of which 2 are; 3 ties."""
    long, brief = PROSE + " And some more words, which nobody needs at all here.", PROSE
    for index in range(20):
        yield Contest(f"{ASK} {index}", long if index < 15 else brief, PROSE, "loss", 0.0, float(index))
        yield Contest(f"{ASK} w{index}", long if index < 2 else brief, PROSE, "win")
    yield from (Contest(ASK, long, brief, "tie") for _ in range(3))


def test_losses_are_counted_against_wins_and_prompts_are_collected_by_urgency(tmp_path, monkeypatch):
    monkeypatch.setattr(behaviour, "EXAMPLES", 2)
    monkeypatch.setattr(behaviour, "COLLECTED", 18)
    result = analyze_failures(rows(), tmp_path)
    assert result["outcomes"] == {"loss": 20, "win": 20, "tie": 3}
    longer, *rest = result["groups"]
    assert (longer["name"], longer["losses"], longer["wins"], longer["telling"]) == ("longer", 15, 2, True)
    assert longer["ratio"] == pytest.approx(15.5 / 2.5) and longer["low"] > 1
    assert "balance_length=true" in longer["advice"]
    other = rest[-1]
    assert (other["name"], other["losses"], other["wins"], other["telling"]) == ("other", 5, 18, False)
    collected = [json.loads(line) for line in (tmp_path / "collect.jsonl").read_text().splitlines()]
    numbers = [int(row["prompt"].split()[-1]) for row in collected]
    assert numbers == [*range(14, -1, -1), 19, 18, 17]  # the telling group first, in it by gold reward lost
    assert result["collected"] == 18 and "prompts of this evaluation" in result["note"]
    shown = (tmp_path / "longer.md").read_text()
    assert shown.count("## Example") == 2 and "15 of the losses, 2 of the wins" in shown and "6.20 [" in shown
    assert not (tmp_path / "refusal.md").exists()
    analyze_failures([], tmp_path)
    assert not (tmp_path / "longer.md").exists()  # it would show what is lost no more


def test_a_prompt_asked_several_times_is_collected_once(tmp_path):
    twice = [Contest(ASK, "A tent.", PROSE, "loss", 0.0, gold) for gold in (1.0, 2.0)]
    analyze_failures(twice, tmp_path)
    assert len((tmp_path / "collect.jsonl").read_text().splitlines()) == 1


def test_what_chance_alone_makes_is_seldom_telling(tmp_path):
    """60 analyses of 40 losses and 40 wins whose texts have the same kinds: at most 2.5 % each, so 5 or fewer tell."""
    rng, found = random.Random(9), 0
    for number in range(60):
        mixed = [
            Contest(row.prompt, row.answer, row.other, outcome)
            for outcome in ("loss", "win")
            for row in (rng.choice(list(CASES.values()))[rng.randint(0, 1)] for _ in range(40))
        ]
        result = analyze_failures(mixed, tmp_path / str(number))
        found += any(group["telling"] for group in result["groups"])
    assert found <= 5


def test_nothing_to_analyze_is_said_so(tmp_path):
    result = analyze_failures([], tmp_path)
    assert not any(group["losses"] or group["telling"] for group in result["groups"])
