# ruff: noqa: E501 - one form a line
"""Every form of preference data: a row as others publish it, and the row that it is, written by hand."""

import csv
import json
import subprocess
import sys
import typing

import pytest

from dpo_kit.config.settings import FormName
from dpo_kit.data.forms import recognise
from dpo_kit.data.published import FORMS, TABLE
from dpo_kit.data.read import Fault, Row, Tie
from dpo_kit.data.rows import ANSWERS
from dpo_kit.data.shape import Shape
from dpo_kit.errors import DataError
from dpo_kit.toy import TRAIN
from tests.conftest import ROOT
from tests.preferences import prepared, write_jsonl

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "My lamp flickers."}
GOOD = {"role": "assistant", "content": "Swap the bulb."}
BAD = {"role": "assistant", "content": "Live with it."}
MORE = {"role": "user", "content": "And now?"}
HUMAN, GPT_GOOD, GPT_BAD = (
    {"from": who, "value": said["content"]} for who, said in (("human", ASK), ("gpt", GOOD), ("gpt", BAD))
)
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
TEXT = {"prompt": "My lamp flickers.", "chosen": "Swap the bulb.", "rejected": "Live with it."}
THUMB = {"prompt": [ASK], "completion": [GOOD], "label": True}
RANKED = {"score_chosen": 0.0, "score_rejected": -1.0}
TOOLS = [{"type": "function", "function": {"name": "order", "parameters": {}}}]
CALL = {"name": "order", "arguments": {"part": "bulb"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


def case(form, row, right, *, id):
    return pytest.param(form, row, right, id=f"{form}: {id}".replace(" ", "-"))


FORM_ROWS = [
    case("pairs", TEXT | {"source": "s"}, TEXT | {"source": "s"}, id="text"),
    case("pairs", PAIR | {"tools": TOOLS}, PAIR | {"tools": TOOLS}, id="chat, tools stay"),
    case("pairs", PAIR | {"chosen": GOOD, "rejected": BAD}, PAIR, id="one message instead of a list"),
    case("pairs", {"messages": [ASK], "chosen": GOOD, "rejected": BAD}, PAIR, id="axolotl's messages"),
    case("pairs", TEXT | {"prompt": [ASK]}, PAIR, id="text answers to a chat"),
    case("pairs", PAIR | {"prompt": ASK["content"]}, PAIR, id="messages that answer a text"),
    case("pairs", {"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": GPT_BAD, "system": "Be brief."}, PAIR | {"system": "Be brief."}, id="LLaMA-Factory's ranking"),
    case("pairs", {"prompt": [{"role": "Human", "content": "My lamp flickers."}], "chosen": [{"role": "Assistant", "content": "Swap the bulb."}], "rejected": [{"role": "MODEL", "content": "Live with it."}]}, PAIR, id="roles in capitals"),
    case("pairs", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "My lamp "}, {"type": "text", "text": "flickers.", "image_url": None}]}], "chosen": GOOD, "rejected": BAD}, PAIR, id="content in parts"),
    case("pairs", {"system": "Be brief.", "question": "My lamp flickers.", "chosen": "Swap the bulb.", "rejected": "Live with it."}, TEXT | {"system": "Be brief."}, id="Orca"),
    case("pairs", {"instruction": "My lamp flickers.", "input": "", "chosen": "Swap the bulb.", "rejected": "Live with it."}, TEXT, id="alpaca's ranking"),
    case("pairs", {"instruction": "What is it?", "input": "My lamp flickers.", "chosen": "a b", "rejected": "c d"}, {"prompt": "What is it?\nMy lamp flickers.", "chosen": "a b", "rejected": "c d"}, id="alpaca with an input"),
    case("pairs", {"instruction": "And now?", "history": [["My lamp flickers.", "Swap the bulb."]], "chosen": "a b", "rejected": "c d"}, {"prompt": [ASK, GOOD, MORE], "chosen": [{"role": "assistant", "content": "a b"}], "rejected": [{"role": "assistant", "content": "c d"}]}, id="alpaca with a history"),
    case("pairs", {"prompt": json.dumps([ASK]), "chosen": json.dumps([GOOD]), "rejected": json.dumps(BAD)}, PAIR, id="chats as JSON text"),
    case("pairs", {"prompt": str([ASK]), "chosen": str([GOOD]), "rejected": str([BAD])}, PAIR, id="chats as Python text"),
    case("chat", {"chosen": [HUMAN, GPT_GOOD], "rejected": [HUMAN, GPT_BAD]}, PAIR, id="whole ShareGPT conversations"),
    case("chat", {"prompt": ASK["content"], "prompt_id": "7", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD], "score_chosen": 8.0}, PAIR | {"prompt_id": "7", "score_chosen": 8.0, "messages": [ASK, GOOD]}, id="UltraFeedback binarized"),
    case("chat", {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PAIR, id="the prompt's messages again"),
    case("chat", {"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, CALLED, GOOD], "rejected": [SYSTEM, ASK, CALLED, BAD]}, {"prompt": [SYSTEM, ASK], "chosen": [CALLED, GOOD], "rejected": [CALLED, BAD]}, id="cut where the given prompt ends"),
    case("chat", {"conversations": [HUMAN, {"from": "gpt", "value": "x"}], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PAIR | {"conversations": [HUMAN, {"from": "gpt", "value": "x"}]}, id="other conversations beside whole ones"),
    case("hh_rlhf", {"chosen": "\n\nHuman: My lamp flickers.\n\nAssistant: Swap the bulb.", "rejected": "\n\nHuman: My lamp flickers.\n\nAssistant: Live with it."}, PAIR, id="transcripts"),
    case("hh_rlhf", {"prompt": "\n\nHuman: My lamp flickers.\n\nAssistant: Swap the bulb.\n\nHuman: And now?\n\nAssistant:", "chosen": "a b", "rejected": "c d"}, {"prompt": [ASK, GOOD, MORE], "chosen": [{"role": "assistant", "content": "a b"}], "rejected": [{"role": "assistant", "content": "c d"}]}, id="a prompt that is a transcript"),
    case("responses", {"instruction": "My lamp flickers.", "chosen_response": "Swap the bulb.", "rejected_response": "Live with it."}, TEXT, id="Argilla, NeMo Aligner"),
    case("stack_exchange", {"question": "My lamp flickers.", "response_j": "Swap the bulb.", "response_k": "Live with it."}, TEXT, id="paired"),
    case("unary", {"prompt": "My lamp flickers.", "completion": "Swap the bulb.", "label": True}, {"prompt": "My lamp flickers.", "completion": "Swap the bulb.", "label": True}, id="TRL"),
    case("unary", {"prompt": [ASK], "completion": GOOD, "label": True, "score": 3}, THUMB | {"score": 3}, id="one message, a score beside"),
    case("unary", {"instruction": "What is it?", "input": "My lamp flickers.", "output": "Swap it.", "kto_tag": False}, {"prompt": "What is it?\nMy lamp flickers.", "completion": "Swap it.", "label": False}, id="alpaca's kto_tag"),
    case("chat_unary", {"messages": [ASK, GOOD], "kto_tag": True}, THUMB, id="LLaMA-Factory's kto_tag"),
    case("chat_unary", {"conversations": [HUMAN, GPT_GOOD], "label": True, "tools": TOOLS}, THUMB | {"tools": TOOLS}, id="ms-swift's label"),
    case("swift", {"messages": [SYSTEM, ASK, GOOD], "rejected_response": "Live with it."}, PAIR | {"prompt": [SYSTEM, ASK]}, id="rejected_response"),
    case("swift_chat", {"messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]}, PAIR, id="rejected_messages"),
    case("alpaca", {"instruction": "My lamp flickers.", "output": ["Swap the bulb.", "Live with it."]}, TEXT, id="two outputs"),
    case("openai", {"input": {"messages": [ASK], "tools": TOOLS, "parallel_tool_calls": True}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, PAIR | {"tools": TOOLS, "parallel_tool_calls": True}, id="its preference form"),
    case("pku_saferlhf", {"prompt": "My lamp flickers.", "response_0": "Live with it.", "response_1": "Swap the bulb.", "better_response_id": 1, "safer_response_id": 0}, TEXT | {"safer_response_id": 0}, id="better, not safer"),
    case("shp", {"history": "My lamp flickers.", "human_ref_A": "Live with it.", "human_ref_B": "Swap the bulb.", "labels": 0, "score_ratio": 2.0}, TEXT | {"score_ratio": 2.0}, id="labels 0 is B"),
    case("arena", {"model_a": "m", "conversation_a": [ASK, BAD], "conversation_b": [ASK, GOOD], "winner": "model_b"}, PAIR | {"model_a": "m"}, id="votes"),
    case("arena_text", {"prompt": "My lamp flickers.", "response_a": "Swap the bulb.", "response_b": "Live with it.", "winner": "A"}, TEXT, id="votes"),
    case("helpsteer", {"prompt": "My lamp flickers.", "response_1": "Swap the bulb.", "response_2": "Live with it.", "preference_strength": -2}, TEXT, id="negative is the first"),
    case("helpsteer3", {"context": [ASK], "response1": "Live with it.", "response2": "Swap the bulb.", "overall_preference": 3}, PAIR, id="positive is the second"),
    case("ultrafeedback", {"instruction": "My lamp flickers.", "completions": [{"response": "Live with it.", "fine-grained_score": 2.5, "overall_score": 9}, {"response": "Swap the bulb.", "fine-grained_score": 4.0, "overall_score": 5}]}, TEXT | {"score_chosen": 4.0, "score_rejected": 2.5}, id="rated completions"),
    case("ranked", {"context": [ASK], "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]}, PAIR | RANKED, id="NeMo's completions"),
    case("ranked", {"prompt": "\n\nHuman: My lamp flickers.\n\nAssistant: ", "answers": [{"answer": "Swap the bulb.", "rank": 1.0}, {"answer": "x", "rank": 2.0}, {"answer": "Live with it.", "rank": 3.0}]}, PAIR | {"score_chosen": -1.0, "score_rejected": -3.0}, id="Nectar"),
    case("scored", {"input": "My lamp flickers.", "generations": ["Live with it.", "Swap the bulb."], "rating": [1, 4.5]}, TEXT | {"score_chosen": 4.5, "score_rejected": 1.0}, id="distilabel"),
    case("scored", {"prompt": "My lamp flickers.", "responses": ["Swap the bulb.", "Live with it."], "ranks": [1, 2]}, TEXT | {"score_chosen": -1.0, "score_rejected": -2.0}, id="ranks"),
]  # fmt: skip


def read(*rows, columns=None, asked=None, typed=True, bare=False):
    """The form of `rows`, and what training makes of each."""
    from dpo_kit.data.published import best_and_worst

    items = [Row(f"x:{number}", row, typed) for number, row in enumerate(rows, start=1)]
    match = recognise("x", items, columns or {}, asked, bare=bare)
    made = [match.read(item) for item in items]
    if match.form.rows == "scored":
        made = [best_and_worst(row) if isinstance(row, Row) else row for row in made]
    return match, made


@pytest.mark.parametrize(("form", "row", "right"), FORM_ROWS)
def test_a_row_of_each_form_is_told_by_its_columns_and_read_as_written_by_hand(form, row, right):
    match, (made,) = read(row)
    assert match.form.name == form and isinstance(made, Row), made
    assert made.values == right


def test_every_form_of_the_table_has_a_row_here_and_a_name_in_the_settings():
    assert {param.values[0] for param in FORM_ROWS} == set(FORMS) - {"rated", "prompts"}
    assert set(typing.get_args(FormName)) == set(FORMS) and len(FORMS) == len(TABLE)
    readme = (ROOT / "docs" / "data.md").read_text()
    assert [name for name in FORMS if f"`{name}`" not in readme] == ["prompts"]


@pytest.mark.parametrize(
    "written",
    [
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": str([CALL])},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    ],
)
def test_calls_and_what_tools_say_have_the_roles_and_fields_of_the_standard(written):
    asked = [HUMAN, written, {"from": "observation", "value": "1 ordered"}]
    _, (made,) = read({"conversations": asked, "chosen": GPT_GOOD, "rejected": GPT_BAD})
    assert made.values["prompt"] == [ASK, CALLED, {"role": "tool", "content": "1 ordered"}]


def test_calls_at_the_same_time_are_one_turn():
    calls = [{"role": "tool_call", "content": json.dumps(CALL)}] * 2
    _, (made,) = read(
        {"messages": [ASK, *calls, {"role": "tool_response", "content": "ok"}, GOOD], "rejected_response": "x"}
    )
    assert [message["role"] for message in made.values["prompt"]] == ["user", "assistant", "tool"]
    assert len(made.values["prompt"][1]["tool_calls"]) == 2


def test_ties_are_counted_and_never_refused(tmp_path):
    votes = [
        {
            "prompt": f"Lamp {i}?",
            "response_a": f"Swap bulb {i}.",
            "response_b": "No.",
            "winner": "tie" if i % 3 == 0 else "model_b",
        }
        for i in range(12)
    ]
    found = prepared(write_jsonl(tmp_path / "a.jsonl", votes))
    assert found.report["dropped_by_reason"] == {"neither answer is better": 4}
    assert [fault.place.rpartition(":")[2] for fault in found.dropped] == ["1", "4", "7", "10"]
    assert all(row["chosen"][0]["content"] == "No." for row in found.train)
    ranked = [
        {
            "context": f"Lamp {i}?",
            "completions": [{"completion": "Yes.", "rank": 0}, {"completion": "No.", "rank": i % 2}],
        }
        for i in range(12)
    ]
    assert prepared(write_jsonl(tmp_path / "b.jsonl", ranked)).report["dropped_by_reason"] == {
        "no two answers that differ in score": 6
    }


UNFIT = [
    ({"history": "Q?", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "labels names no answer", "known are 1, 0"),
    ({"conversation_a": [ASK, GOOD], "conversation_b": [ASK, BAD], "winner": "both"}, "winner names no answer", "known are model_a"),
    ({"prompt": "Other?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "prompt is not in the conversations", "data.columns="),
    ({"messages": [ASK], "rejected_response": "x"}, "messages is no chat that ends with an answer", "leave the row out"),
    ({"messages": "hello", "rejected_response": "x"}, "messages is text that holds no list or object", "json.dumps"),
    ({"messages": "[" * 100_000, "rejected_response": "x"}, "messages is text that holds no list or object", "json.dumps"),
    ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "chosen": GOOD, "rejected": BAD}, "has a part that is no text", "only text trains"),
    ({"conversations": [HUMAN, {"from": "function_call", "value": "order()"}], "chosen": GPT_GOOD, "rejected": GPT_BAD}, "text that holds no list or object", "json.dumps"),
    (PAIR | {"chosen": [GOOD | {"tool_calls": ["order"]}]}, "chosen has a call without a name", "a call is"),
    ({"conversations": [HUMAN], "chosen": {"from": "alien", "value": "x"}, "rejected": GPT_BAD}, "chosen has an unknown role", "known are"),
    ({"instruction": "Q?", "output": ["only one"]}, "output is no list of two answers", "the better one"),
    ({"input": [], "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "input is no object with messages", "messages"),
    ({"prompt": "Q?", "answers": ["a", "b"], "scores": [1, None]}, "a score is no number", "number"),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant: Yes", "chosen": "a", "rejected": "b"}, "does not end with Assistant:", "leave the row out"),
    ({"instruction": "Q?", "input": ["a"], "chosen": "a", "rejected": "b"}, "instruction and input are no texts", "text"),
    ({"instruction": "Q?", "history": [["a"]], "chosen": "a", "rejected": "b"}, "history is no list of turns", "a turn is"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "remedy"), UNFIT)
def test_a_row_that_is_not_what_its_columns_say_is_a_fault_with_its_remedy(row, reason, remedy):
    _, (made,) = read(row)
    assert isinstance(made, Fault) and not isinstance(made, Tie)
    assert reason in made.reason and remedy in made.remedy and made.place == "x:1"


def test_what_could_be_two_things_is_refused_with_the_words_that_settle_it():
    both = {"messages": [ASK, GOOD], "rejected_response": "x", "label": True}
    with pytest.raises(
        DataError,
        match=r"could be read as chat_unary \(messages, label\) or as swift.*data.form=chat_unary or data.form=swift",
    ):
        read(both)
    assert read(both, asked="swift")[1][0].values["rejected"] == [{"role": "assistant", "content": "x"}]
    two = {"question": "Q?", "context": "C.", "chosen": "a", "rejected": "b"}
    with pytest.raises(
        DataError, match=r"question or context could be the column 'prompt'.*data.columns=\{prompt: question\}"
    ):
        read(two)
    assert read(two, columns={"prompt": "question"})[1][0].values == {
        "prompt": "Q?",
        "chosen": "a",
        "rejected": "b",
        "context": "C.",
    }


def test_chosen_and_rejected_decide_whatever_stands_beside_them():
    row = TEXT | {"completion": "x", "label": True, "generations": ["a", "b"], "rating": [1, 2], "score": 3}
    assert read(row)[1][0].values == row


@pytest.mark.parametrize("kind", ["pairs", "unary", "prompts"])
def test_a_prompt_that_is_a_transcript_becomes_a_chat_in_rows_of_every_kind(kind):
    text = "\n\nHuman: My lamp flickers.\n\nAssistant: Swap the bulb.\n\nHuman: And now?\n\nAssistant:"
    row = {"prompt": text, **dict.fromkeys(ANSWERS[kind], "Done?")}
    assert Shape(wrap=True).of(row, kind)["prompt"] == [ASK, GOOD, MORE]
    assert Shape(wrap=False).of(row, kind) == row
    for other in ("Human: a", f"Translate:{text}", f"{text} It", "Assistant:", text.replace("Human", "Robot")):
        assert Shape(wrap=True).of(row | {"prompt": other}, kind)["prompt"] == [{"role": "user", "content": other}]


def test_data_form_overrides_and_says_what_it_needs():
    transcript = {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: c",
        "prompt": "\n\nHuman: a\n\nAssistant:",
    }
    assert read(transcript)[0].form.name == "hh_rlhf"
    assert (
        read(transcript | {"chosen": " b", "rejected": " c"}, asked="pairs")[1][0].values["prompt"]
        == "\n\nHuman: a\n\nAssistant:"
    )
    with pytest.raises(DataError, match=r"data.form=arena needs conversation_a conversation_b winner"):
        read(TEXT, asked="arena")
    with pytest.raises(DataError, match=r"prompts alone train method=online_dpo"):
        read({"prompt": "Q?"}, asked="prompts")
    assert read({"question": "Q?"}, bare=True)[1][0].values == {"prompt": "Q?"}


def test_answers_that_are_json_stay_text_where_most_of_them_are():
    call = json.dumps([{"role": "x"}])
    rows = [TEXT | {"prompt": f"{i}?", "chosen": call if i == 0 else "Swap it."} for i in range(5)]
    match, made = read(*rows)
    assert match.texts == () and made[0].values["chosen"] == call
    rows = [PAIR | {"chosen": json.dumps([GOOD])}] * 3 + [PAIR | {"chosen": "Swap it."}]
    match, made = read(*rows)
    assert match.texts == ("chosen",) and "chats written as text: chosen" in str(match)
    assert [isinstance(row, Row) for row in made] == [True, True, True, False]


def test_a_table_of_cells_reads_as_the_rows_that_were_written_into_it(tmp_path):
    rows = [
        {"conversations": str([HUMAN | {"value": f"{i}?"}]), "chosen": json.dumps(GPT_GOOD), "rejected": str(GPT_BAD)}
        for i in range(8)
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], delimiter=";")
        table.writeheader()
        table.writerows(rows)
    found = prepared(str(tmp_path / "a.csv"))
    assert found.train[0]["chosen"] == [GOOD] and found.report["rows"]["dropped"] == 0
    assert found.report["forms"] == {
        str(
            tmp_path / "a.csv"
        ): "pairs (conversations, chosen, rejected; chats written as text: conversations, chosen, rejected)"
    }
    tags = [{"messages": json.dumps([ASK | {"content": f"{i}?"}, GOOD]), "kto_tag": i % 2 == 0} for i in range(12)]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, tags[0])
        table.writeheader()
        table.writerows(tags)
    assert prepared(str(tmp_path / "b.csv"), wanted="unary").report["desirable"] > 0


def test_single_scored_answers_are_refused_with_the_command_that_pairs_them(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q?", "response": f"a{i}", "score": i} for i in range(4)])
    with pytest.raises(DataError, match=r"mode=convert data=jsonl data.train=.* makes pairs"):
        prepared(file)


def test_sources_of_different_forms_make_one_mixture_each_with_its_own(tmp_path):
    one = write_jsonl(
        tmp_path / "a.jsonl",
        [{"conversations": [HUMAN | {"value": f"a{i}?"}], "chosen": GPT_GOOD, "rejected": GPT_BAD} for i in range(6)],
    )
    other = write_jsonl(
        tmp_path / "b.jsonl",
        [{"messages": [ASK | {"content": f"b{i}?"}, GOOD], "rejected_response": "x", "label": True} for i in range(6)],
    )
    found = prepared([one, {"path": other, "form": "swift"}])
    assert sum(found.report["rows"].values()) == 12 and len(found.report["forms"]) == 2


def test_plain_pairs_are_read_without_what_other_forms_need():
    script = f"""
import sys
from dpo_kit.data.forms import recognise
from dpo_kit.data.read import Row, read_source
rows = list(read_source({str(TRAIN)!r}, "train"))
match = recognise("x", rows, {{}})
assert all(isinstance(match.read(row), Row) for row in rows), match
print([name for name in ("published", "spelling", "read_files") if f"dpo_kit.data.{{name}}" in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
