"""Curation: every filter by hand, and a result that depends on nothing but rows, options and seed."""

import json
import random

import pytest

from dpo_kit.data.curate.rules import Setting, curate
from dpo_kit.data.options import Curate
from dpo_kit.data.prepare import keep_signal
from dpo_kit.data.shape import add_ids
from dpo_kit.errors import ConfigError, DataError
from tests.preferences import labels, pairs, tokenizer, words


def rows_of(values, kind="pairs"):
    rows = [dict(row) | {"_place": f"x:{i}", "_values": row} for i, row in enumerate(values, start=1)]
    add_ids(rows, rows, kind, tokenizer(), [])
    return keep_signal(rows, kind, None, "keep_start", [])


def run(values, *, kind="pairs", held=(), seed=0, hardness=None, **options):
    """(lines kept, {line left out: reason})."""
    rows, left_out = curate(rows_of(values, kind), Setting(kind, Curate(**options), seed, held, hardness))
    kept = sorted(int(row["_place"][2:]) for row in rows)
    return kept, {int(fault.place[2:]): fault.reason for _, fault in left_out}


def test_labels_that_raters_do_not_agree_on_are_left_out():
    values = [row | {"agreement": share} for row, share in zip(pairs(5), (0.6, 0.7, 1.0, 0.5, None), strict=True)]
    assert run(values) == ([2, 3, 5], {1: "raters disagree", 4: "tie"})
    assert run(values, min_agreement=None, drop_ties=False)[0] == [1, 2, 3, 4, 5]
    assert run(values, min_agreement=0.9)[0] == [3, 5]


def rated(*scores):
    return [
        row | {"score_chosen": a, "score_rejected": b} for row, (a, b) in zip(pairs(len(scores)), scores, strict=True)
    ]


def test_ties_and_ratings_against_the_label_are_left_out():
    values = rated((4, 2), (3, 3), (2, 4), (4, 3.5))
    assert run(values) == ([1, 4], {2: "tie", 3: "rated the other way round"})
    assert run(values, min_gap=1)[1] == {2: "tie", 3: "rated the other way round", 4: "ratings too close"}
    assert run(values, min_gap=None, drop_ties=False)[0] == [1, 2, 3, 4]


def test_a_ratio_of_ratings_is_asked_for_on_request_and_refused_below_zero():
    values = rated((3, 2), (2.8, 2), (1, 0), (10, 9))
    assert run(values)[0] == [1, 2, 3, 4]
    assert run(values, min_ratio=1.5) == ([1, 3], {2: "ratio of ratings too small", 4: "ratio of ratings too small"})
    assert run(values, min_ratio=1.1)[0] == [1, 2, 3, 4]
    with pytest.raises(DataError, match=r"x:1: -1, a rating below zero, .* leave out curate\.min_ratio"):
        run(rated((1, -1)), min_ratio=1.5)


def test_contradictions_go_on_both_sides_near_ones_too():
    one, two, three = pairs(3)
    swapped = {"prompt": one["prompt"], "chosen": one["rejected"], "rejected": one["chosen"]}
    nearly = {"prompt": two["prompt"], "chosen": two["rejected"].upper() + ".", "rejected": two["chosen"]}
    kept, left_out = run([one, two, three, swapped, nearly])
    assert kept == [3] and set(left_out.values()) == {"contradicts another row"} and len(left_out) == 4
    assert run([one, two, three, swapped], drop_contradictions=False)[0] == [1, 2, 3, 4]


def test_of_copies_and_near_duplicates_the_surest_stays():
    one, two = pairs(2)
    near = one | {"chosen": one["chosen"].title() + "!"}
    values = [one | {"agreement": 0.8}, near | {"agreement": 1.0}, two, two]
    kept, left_out = run(values)
    assert kept[0] == 2 and len(kept) == 2 and left_out[1] == "near-duplicate of another row"
    assert sorted(left_out.values()) == ["copy of another row", "near-duplicate of another row"]
    assert run(values, drop_duplicates=False)[0] == [1, 2, 3, 4]


def test_prompts_that_are_held_out_are_left_out():
    values = pairs(4)
    held = [values[0]["prompt"], values[1]["prompt"].upper() + " ?"]
    assert run(values, held=held) == ([3, 4], dict.fromkeys([1, 2], "prompt is held out or in the benchmark"))
    assert run(values, held=held, drop_leaks=False)[0] == [1, 2, 3, 4]


def test_a_source_is_capped_by_a_seeded_draw():
    values = [row | {"source": "a" if i < 8 else "b"} for i, row in enumerate(pairs(10))]
    draws = [run(values, per_source=3, seed=seed)[0] for seed in range(4)]
    assert all(sum(line <= 8 for line in kept) == 3 and {9, 10} <= set(kept) for kept in draws)
    assert len(set(map(tuple, draws))) > 1 and run(values, per_source=3, seed=0)[0] == draws[0]
    with pytest.raises(ConfigError, match=r"curate.source=origin: x:.* has no such column"):
        run(values, per_source=3, source="origin")


def test_after_balancing_length_says_nothing_about_the_label():
    rng = random.Random(0)
    values = []
    for i in range(200):
        long, short = words(rng, rng.randint(20, 60)), words(rng, rng.randint(5, 19))
        chosen, rejected = (long, short) if i % 4 else (short, long)  # the longer one is chosen in three of four
        values.append({"prompt": words(rng, 8), "chosen": chosen, "rejected": rejected})
    rows, _ = curate(rows_of(values), Setting("pairs", Curate(balance_length=True), 0))
    gaps = [row["tokens"]["chosen"] - row["tokens"]["rejected"] for row in rows]
    longer = sum(gap > 0 for gap in gaps)
    assert longer == sum(gap < 0 for gap in gaps) and 70 <= len(gaps) <= 100
    assert abs(sum(gap for gap in gaps)) / len(gaps) < 12  # differences of all sizes are balanced


def test_the_hardest_pairs_are_those_the_reference_gets_most_wrong():
    values = pairs(6)
    margins = {row["prompt"]: margin for row, margin in zip(values, (0.3, -0.2, 0.1, -0.5, 0.0, 0.9), strict=True)}
    kept, left_out = run(values, hardest=3, hardness=lambda rows: [margins[row["prompt"]] for row in rows])
    assert kept == [2, 4, 5] and set(left_out.values()) == {"not among the hardest"}


def test_what_compares_two_answers_is_refused_for_single_ones():
    with pytest.raises(ConfigError, match=r"curate\.hardest compares two answers"):
        run(labels(6), kind="unary", hardest=3)


def test_nothing_left_is_an_error_that_counts_the_filters():
    with pytest.raises(DataError, match=r"raters disagree: 3.*loosen"):
        run([row | {"agreement": 0.6} for row in pairs(3)])


@pytest.mark.parametrize("seed", range(3))
def test_the_same_rows_in_another_order_give_the_same_set(seed):
    rng = random.Random(seed)
    values = [
        row | {"agreement": rng.choice((0.6, 0.8, 1.0)), "source": rng.choice("ab")} for row in pairs(60, seed=seed)
    ]
    values += [row | {"rejected": row["rejected"].title()} for row in values[:20]] + values[20:30]
    options = {"per_source": 20, "balance_length": True}
    shuffled = rng.sample(values, len(values))
    one, other = (curate(rows_of(each), Setting("pairs", Curate(**options), 0)) for each in (values, shuffled))
    texts = [json.dumps([row["_values"] for row in kept]) for kept, _ in (one, other)]
    assert texts[0] == texts[1]
    assert len(one[0]) + len(one[1]) == len(values)
