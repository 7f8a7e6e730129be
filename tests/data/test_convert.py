# ruff: noqa: E501 - one case a line
"""Conversion: golden examples of our own for every schema, and nothing lost on the way."""

import pytest

from dpo_kit.data.curate.convert import convert
from dpo_kit.data.forms import recognise
from dpo_kit.data.options import Convert
from dpo_kit.data.read import Fault, Row
from dpo_kit.errors import ConfigError

ASK = [{"role": "user", "content": "My lamp flickers."}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("Swap the bulb.", "Live with it."))
PAIR = {"prompt": "My lamp flickers.", "chosen": "Swap the bulb.", "rejected": "Live with it."}
TRANSCRIPTS = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: My lamp flickers.\n\nAssistant: Swap the bulb.",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: My lamp flickers.\n\nAssistant: Live with it.",
}
THUMB = {"prompt": "My lamp flickers.", "completion": "Swap the bulb.", "label": True}
SCORED = {"prompt": "Q?", "answers": ["a one", "b two", "c three", "d four"], "scores": [2, 5, 1, 5], "source": "s"}


def run(*rows, columns=None, schema=None, **options):
    items = [Row(f"x:{i}", row) if isinstance(row, dict) else row for i, row in enumerate(rows, start=1)]
    match = recognise("x", [item for item in items if isinstance(item, Row)], columns or {}, schema)
    read = [match.read(item) if isinstance(item, Row) else item for item in items]
    found = convert([(match.form, [row for row in read if isinstance(row, Row)])], Convert(**options), 0)
    found.faults[:0] = [fault for fault in read if isinstance(fault, Fault)]
    return found


GOLDEN = [
    ("chat", {"prompt": "My lamp flickers.", "chosen": [*ASK, *GOOD], "rejected": [*ASK, *BAD], "score_chosen": 8.0}, {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "score_chosen": 8.0}),
    ("hh_rlhf", TRANSCRIPTS, {"prompt": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}, *ASK], "chosen": GOOD, "rejected": BAD}),
    ("ultrafeedback", {"source": "s", "instruction": "Q?", "models": ["m", "n"], "completions": [{"model": "m", "response": "a", "fine-grained_score": 3.5, "overall_score": 9}, {"model": "n", "response": "b", "fine-grained_score": 4.25, "overall_score": 5}]}, {"source": "s", "models": ["m", "n"], "prompt": "Q?", "chosen": "b", "rejected": "a", "score_chosen": 4.25, "score_rejected": 3.5}),
    ("scored", {"question": "Q?", "responses": ["a", "b", "c"], "ranks": [2, 3, 1]}, {"prompt": "Q?", "chosen": "c", "rejected": "b", "score_chosen": -1.0, "score_rejected": -3.0}),
    ("pairs", PAIR, PAIR),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "row", "pair"), GOLDEN, ids=[name for name, _, _ in GOLDEN])
def test_a_golden_row_of_each_schema_becomes_its_pair(schema, row, pair):
    assert run(row, schema=schema).rows == [pair]


def test_rated_answers_of_one_prompt_come_together_wherever_they_stand():
    rows = [{"prompt": p, "response": r, "score": s} for p, r, s in [("A", "a", 1), ("B", "x", 3), ("A", "b", 4)]]
    found = run(*rows, schema="rated")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found.rows] == [("A", "b", "a")]
    assert [(fault.place, fault.reason) for fault in found.faults] == [("x:2", "only one answer")]
    assert found.used == {"x:1", "x:3"}


def test_which_pairs_scored_answers_make():
    def made(**options):
        return [(row["chosen"][0], row["rejected"][0]) for row in run(SCORED, schema="scored", **options).rows]

    assert made() == [("b", "c")]
    assert sorted(made(pairing="all")) == [("a", "c"), ("b", "a"), ("b", "c"), ("d", "a"), ("d", "c")]  # never b, d
    assert sorted(made(pairing="all", min_gap=4)) == [("b", "c"), ("d", "c")]
    assert made(pairing="best_random") in ([("b", "a")], [("b", "c")])
    assert made(pairing="best_random") == made(pairing="best_random")


def test_scores_that_do_not_differ_make_no_pair_and_are_counted():
    found = run(SCORED | {"scores": [3, 3, 3, 3]}, schema="scored")
    assert not found.rows and found.faults[0].reason == "no two answers that differ in score"


def test_pairs_become_labels_and_labels_pairs_again():
    rows = [PAIR, {"prompt": "My oven beeps.", "chosen": "Replace the battery.", "rejected": "No."}]
    labels = run(*rows, to="unary").rows
    assert [(row["completion"], row["label"]) for row in labels[:2]] == [
        ("Swap the bulb.", True),
        ("Live with it.", False),
    ]
    back = run(*labels, schema="unary").rows
    assert [{key: row[key] for key in PAIR} for row in back] == rows


def test_an_answer_with_both_labels_is_left_out_and_counted():
    swapped = PAIR | {"chosen": PAIR["rejected"], "rejected": "It is fine."}
    found = run(PAIR, swapped, to="unary")
    assert [row["completion"] for row in found.rows] == ["Swap the bulb.", "It is fine."]
    assert [fault.reason for fault in found.faults] == ["an answer has both labels"] * 2
    assert found.used == {"x:1", "x:2"}


def test_scores_become_labels_by_a_stated_threshold():
    with pytest.raises(ConfigError, match=r"convert.threshold is missing"):
        run(SCORED, schema="scored", to="unary")
    found = run(SCORED, schema="scored", to="unary", threshold=2)
    assert [row["label"] for row in found.rows] == [True, True, False, True]


def test_columns_are_renamed_first():
    row = {"ask": "Q?", "good": "a b", "bad": "c d"}
    found = run(row, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert found.rows == [{"prompt": "Q?", "chosen": "a b", "rejected": "c d"}]


UNFIT = [
    ("hh_rlhf", {"chosen": "Hello", "rejected": "Bye"}, "chosen is no transcript"),
    ("hh_rlhf", TRANSCRIPTS | {"rejected": "\n\nHuman: Other\n\nAssistant: No.\n\nHuman: x\n\nAssistant: y"}, "column 'prompt' is missing"),
    ("chat", {"chosen": ASK, "rejected": ASK}, "chosen does not end with the assistant"),
    ("ultrafeedback", {"instruction": "Q?", "completions": ["a"]}, "is no list of objects"),
    ("scored", {"prompt": "Q?", "answers": ["a"], "scores": [1, 2]}, "no lists of one length"),
    ("scored", {"prompt": "Q?", "answers": ["a", "b"], "scores": [1, None]}, "a score is no number"),
    ("rated", {"prompt": "Q?", "score": 1}, "column 'completion' is missing or null"),
    ("unary", {"prompt": "Q?", "completion": "a", "label": 1}, "label is not true or false"),
    ("pairs", {"prompt": "Q?", "chosen": "a"}, "column 'rejected' is missing"),
    ("pairs", PAIR | {"chosen": " "}, "chosen is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "row", "reason"), UNFIT)
def test_a_row_that_has_not_its_schema_is_a_fault_and_the_others_go_on(schema, row, reason):
    golden = {name: good for name, good, _ in GOLDEN}
    golden |= {"rated": {"prompt": "Q?", "completion": "a", "score": 1}, "unary": THUMB}
    found = run(row, golden[schema], Fault("x:3", "not JSON", "…"), schema=schema)
    assert reason in found.faults[0].reason and {fault.place for fault in found.faults} >= {"x:1", "x:3"}
    assert len({fault.place for fault in found.faults} | found.used) == 3
