"""All that belongs to a prompt reaches it, whatever the column and the spelling; what cannot be trained is refused."""

import json
import logging
import re

import pyarrow
import pyarrow.parquet
import pytest

from dpo_kit.data.build.prompts import read_prompts
from dpo_kit.data.prepare import prepare
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.model import template
from dpo_kit.model.chats import conversation_text, prompt_of, split_context, text_of
from dpo_kit.model.turns import neutralised
from tests import styles
from tests.preferences import data, write_jsonl

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "York"}}}


@pytest.fixture(autouse=True)
def _trusted(monkeypatch):
    """The templates here are our own: no process to try them in."""
    monkeypatch.setattr(template, "_try", lambda given: None)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def pairs(count=6, **more):
    """Chat rows with different prompts."""
    return [
        {"prompt": [user(f"Rain {n}?")], "chosen": [assistant(f"Yes {n}.")], "rejected": [assistant("No.")], **more}
        for n in range(count)
    ]


def texts(count=6, **more):
    return [{"prompt": f"Rain {n}?", "chosen": f"Yes {n}.", "rejected": "No.", **more} for n in range(count)]


def read(tmp_path, rows, style="chatml", ends=None, tokenizer=None, **options):
    """The rows of a file as a run trains on them."""
    file = rows if isinstance(rows, str) else write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = tokenizer or neutralised(styles.tokenizer(style), ends)
    given = {"tokenizer": tokenizer, "max_length": 2000, "truncation": "keep_start", "seed": 0}
    return prepare(data(file, **options), wanted="pairs", **given)


def written(prepared, style="chatml", name="chosen", row=0):
    """What is trained on, as text."""
    ids = prepared.train[row]["ids"]
    return styles.tokenizer(style).decode([*ids["prompt"], *ids[name]])


# --- tools, template arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelt", [lambda value: value, json.dumps], ids=["values", "JSON text"])
def test_tools_and_template_arguments_of_a_row_reach_the_template(tmp_path, spelt):
    tools = pairs(tools=spelt([TOOL]))
    assert TOOL["function"]["description"] in written(read(tmp_path, tools))
    thinking = pairs(chat_template_kwargs=spelt({"enable_thinking": False}))
    train = read(tmp_path, thinking, "qwen3").train
    assert {split_context(row["prompt"])[1]["chat_template_kwargs"]["enable_thinking"] for row in train} == {False}


def test_template_arguments_of_all_rows_give_way_to_a_row_s_own(tmp_path):
    rows = pairs()
    rows[2]["chat_template_kwargs"] = {"enable_thinking": True}
    train = read(tmp_path, rows, "qwen3", chat_template_kwargs={"enable_thinking": False}, holdout=0.01).train
    asked = {text_of(row["prompt"]): split_context(row["prompt"])[1]["chat_template_kwargs"] for row in train}
    assert {text: kwargs["enable_thinking"] for text, kwargs in asked.items()} == {
        text: text == "Rain 2?" for text in asked
    }


@pytest.mark.parametrize(
    ("kwargs", "style", "rows", "said"),
    [
        ({"enable_thinkin": False}, "qwen3", pairs(), "did you mean enable_thinking"),
        ({"add_generation_prompt": True}, "qwen3", pairs(), "no variable of a template"),
        ({"enable_thinking": False}, "qwen3", texts(), "no template is applied"),
    ],
)
def test_an_argument_that_no_template_reads_is_refused(tmp_path, kwargs, style, rows, said):
    wrap = {"wrap_as_chat": False} if rows == texts() else {}
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, rows, style, chat_template_kwargs=kwargs, **wrap)


def test_arrow_s_nulls_are_no_arguments_and_no_tool_calls(tmp_path):
    other = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        row | {"chosen": [assistant(None, tool_calls=[call])]}
        for row, call in zip(pairs(), [CALL, other] * 3, strict=True)
    ]
    file = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    held = pyarrow.parquet.read_table(file).to_pylist()[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]
    assert held == {"town": "York", "a": None}
    train = read(tmp_path, file).train
    assert {json.dumps(row["chosen"][0]["tool_calls"][0]["function"]["arguments"]) for row in train} == {
        '{"town": "York"}', '{"a": 1}'
    }  # fmt: skip
    assert all("tool_calls" not in row["rejected"][0] for row in train)


@pytest.mark.parametrize("content", [None, "", "absent"])
def test_an_assistant_that_calls_a_tool_needs_to_say_nothing(tmp_path, content):
    call = assistant(content, tool_calls=[CALL])
    if content == "absent":
        del call["content"]
    asked = [user("Rain?"), call, {"role": "tool", "name": "weather", "content": "wet"}]
    rows = [row | {"prompt": [*row["prompt"], assistant("?"), *asked], "chosen": [call]} for row in pairs(tools=[TOOL])]
    text = written(read(tmp_path, rows))
    assert text.count('<tool_call>\n{"name": "weather", "arguments": {"town": "York"}}') == 2
    with pytest.raises(DataError, match="chosen is empty"):
        read(tmp_path, [row | {"chosen": [assistant("", tool_calls=[])]} for row in pairs()])


# --- other columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [pairs, texts])
def test_a_system_column_becomes_the_system_turn(tmp_path, rows):
    assert written(read(tmp_path, rows(system="Be a pirate."))).startswith("<|im_start|>system\nBe a pirate.<|im_end|>")
    assert "system" not in written(read(tmp_path, rows(system="")))
    both = [row | {"prompt": [{"role": "system", "content": "Be kind."}, *row["prompt"]]} for row in pairs()]
    assert written(read(tmp_path, [row | {"system": "Be kind."} for row in both])).count("Be kind.") == 1
    with pytest.raises(DataError, match="two system turns"):
        read(tmp_path, [row | {"system": "Be a pirate."} for row in both])


def test_other_columns_are_named_in_the_report_and_parts_of_a_prompt_at_once(tmp_path, caplog):
    report = read(tmp_path, texts(input="The text.", source="x", empty=None)).report
    assert report["unused_columns"] == ["input", "source"]
    (warning,) = (warning for warning in report["warnings"] if warning["about"] == "unused_columns")
    assert "input" in warning["what"] and "source" not in warning["what"]
    assert "not trained on, though it looks like a part of the prompt: column input" in caplog.text
    caplog.clear()
    raw = read(tmp_path, texts(system="Be a pirate.", tools=[TOOL]), wrap_as_chat=False).report
    assert raw["unused_columns"] == ["system", "tools"] and "column system, column tools" in caplog.text


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"images": ["a.png"]}, "images cannot be trained on"),
        ({"audio": "a.wav"}, "audio cannot be trained on"),
        ({"tools": "no JSON"}, "tools is text that is no JSON"),
        ({"tools": {"name": "x"}}, "tools is no list of functions"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is no object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "no variable of a template"),
        ({"system": ["x"]}, "system is not text"),
    ],
)
def test_a_column_that_cannot_be_trained_on_is_refused_with_its_row(tmp_path, column, said):
    rows = pairs()
    rows[3] |= column
    with pytest.raises(DataError, match=rf"rows.jsonl:4: .*{said}"):
        read(tmp_path, rows)
    dropped = read(tmp_path, rows, on_bad_row="drop").dropped
    assert [fault.place.rpartition(":")[2] for fault in dropped] == ["4"]
    assert read(tmp_path, pairs(images=[], audio=None, tools="", system=None)).dropped == []


@pytest.mark.parametrize(
    ("rows", "style", "part"),
    [
        (pairs(tools=[TOOL]), "gemma", "tools"),
        ([row | {"chosen": [assistant("", tool_calls=[CALL])]} for row in pairs()], "zephyr", "tool_calls"),
        (
            [row | {"chosen": [assistant("Yes.", reasoning_content="Wet.")]} for row in pairs()],
            "chatml",
            "reasoning_content",
        ),
    ],
)
def test_what_a_template_would_pass_over_in_silence_is_refused(tmp_path, rows, style, part):
    with pytest.raises(DataError, match=f"the chat template leaves out {part}.*model.chat_template=FILE"):
        read(tmp_path, rows, style)


# --- templates that refuse, system turns -----------------------------------------------------------------------------


def with_system(rows, *places):
    return [
        row | {"prompt": [{"role": "system", "content": "Be kind."}, *row["prompt"]]} if n in places else row
        for n, row in enumerate(rows)
    ]


def test_a_row_that_the_template_refuses_is_named_with_the_template_s_words_or_dropped(tmp_path):
    rows = with_system(pairs(8), 4)
    rows[6]["prompt"] = [user("Rain?"), user("Please.")]
    with pytest.raises(DataError) as refusal:
        read(tmp_path, rows, "gemma")
    said = str(refusal.value)
    assert re.search(
        r"rows.jsonl:5: the chat template refuses this chat \(System role not supported\): data.fold_system=true", said
    )
    assert re.search(
        r"rows.jsonl:7: the chat template refuses this chat \(Conversation roles must alternate\): mend", said
    )
    kept = read(tmp_path, rows, "gemma", on_bad_row="drop")
    assert kept.report["dropped_by_reason"] == {"the chat template refuses this chat": 2}
    assert sum(kept.report["rows"].values()) == kept.report["rows_read"] == 8


def test_a_system_turn_is_folded_into_the_first_user_turn_on_request_and_it_is_said(tmp_path, caplog):
    rows = with_system(pairs(), *range(6))
    with caplog.at_level(logging.INFO):
        train = read(tmp_path, rows, "gemma", fold_system=True).train
    assert all(re.fullmatch(r"Be kind.\n\nRain \d\?", row["prompt"][0]["content"]) for row in train)
    assert "6 rows" in caplog.text and "data.fold_system=true" in caplog.text


def test_a_system_turn_that_the_template_drops_is_refused_too(tmp_path):
    tokenizer = neutralised(styles.tokenizer("chatml"))
    tokenizer.chat_template = tokenizer.chat_template.replace("m.role == 'system')", "true)").replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template leaves out system.*fold_system"):
        read(tmp_path, with_system(pairs(), 1), tokenizer=tokenizer)
    assert read(tmp_path, with_system(pairs(), 1), tokenizer=tokenizer, fold_system=True).dropped == []


def test_rows_that_are_all_dropped_are_said_as_that_with_the_reasons(tmp_path):
    same = [row | {"rejected": row["chosen"]} for row in pairs(3)]
    with pytest.raises(DataError, match=r"3 × chosen and rejected are identical.*rows.jsonl:1"):
        read(tmp_path, same)
    with pytest.raises(DataError, match=r"no row to train on: 4 × .*refuses.*, 2 × chosen is empty"):
        rows = [*with_system(pairs(4), *range(4)), *(row | {"chosen": [assistant("")]} for row in pairs(2))]
        read(tmp_path, rows, "gemma", on_bad_row="drop")


# --- the prompt is never guessed --------------------------------------------------------------------------------------

U, A, B = user("Rain?"), assistant("Yes."), assistant("No.")
NO_PROMPT = "column 'prompt' is missing or null"
GUESSES = {
    "texts that begin alike": (NO_PROMPT, {"chosen": "Q: rain\nA: Yes", "rejected": "Q: rain\nA: No"}),
    "one text begins the other": (NO_PROMPT, {"chosen": "Q: rain", "rejected": "Q: rain and on"}),
    "a null prompt": (NO_PROMPT, {"prompt": None, "chosen": "The sky", "rejected": "The sea"}),
    "one chat begins the other": (
        "one answer is the beginning of the other",
        {"chosen": [U, A], "rejected": [U, A, user("And?"), B]},
    ),
    "user turns that differ": (
        "chosen holds a turn of the user",
        {"chosen": [U, A, user("Much?"), A], "rejected": [U, B, user("Why?"), B]},
    ),
    "a prompt that the assistant has begun": (
        "prompt ends with the assistant",
        {"prompt": [U, assistant("Sure:")], "chosen": [A], "rejected": [B]},
    ),
}


@pytest.mark.parametrize("guess", GUESSES)
def test_a_prompt_that_would_have_to_be_guessed_is_refused(tmp_path, guess):
    reason, row = GUESSES[guess]
    rows = texts() if isinstance(row["chosen"], str) else pairs()
    with pytest.raises(DataError, match=f"rows.jsonl:7: {reason}"):
        read(tmp_path, [*rows, row])


def test_whole_chats_that_part_at_the_last_turn_have_what_is_before_it_as_prompt(tmp_path):
    rows = [
        {"chosen": [user(f"Rain {n}?"), A, user("And?"), A], "rejected": [user(f"Rain {n}?"), A, user("And?"), B]}
        for n in range(6)
    ]
    (row, *_) = read(tmp_path, rows).train
    assert (len(row["prompt"]), row["chosen"], row["rejected"]) == (3, [A], [B])


# --- text that is rendered already, answers that end already ----------------------------------------------------------


def rendered(row, style):
    prompt = styles.tokenizer(style).apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = {
        name: styles.tokenizer(style).apply_chat_template(row["prompt"] + row[name], tokenize=False)
        for name in ("chosen", "rejected")
    }
    return {"prompt": prompt} | {name: text.removeprefix(prompt) for name, text in whole.items()}


def ids_of(prepared):
    """{prompt and both answers as ids} of all rows."""
    every = [*prepared.train, *prepared.select, *prepared.test]
    return {tuple(map(tuple, row["ids"].values())) for row in every}


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "phi3"])
def test_text_that_is_rendered_already_is_not_rendered_twice(tmp_path, style, caplog):
    rows = pairs()
    as_chat, as_text = read(tmp_path, rows, style), read(tmp_path, [rendered(row, style) for row in rows], style)
    assert ids_of(as_text) == ids_of(as_chat)
    assert "they are read as tokens, since raw text is taken as rendered already" in caplog.text
    typed = [texts()[0] | {"prompt": "<|im_start|>user, said a user"}, *texts()]
    assert read(tmp_path, typed).report["control_tokens"]["read_as"] == "text"


@pytest.mark.parametrize("rows", [pairs, texts])
def test_the_end_that_an_answer_has_already_is_written_once(tmp_path, rows):
    def ended(answer):
        return f"{answer}<|im_end|>\n" if isinstance(answer, str) else [assistant(answer[0]["content"] + "<|im_end|>")]

    plain = read(tmp_path, rows())
    twice = read(tmp_path, [row | {name: ended(row[name]) for name in ("chosen", "rejected")} for row in rows()])
    assert [written(twice, row=n) for n in range(4)] == [written(plain, row=n) for n in range(4)]
    assert [row["chosen"] for row in twice.train] == [row["chosen"] for row in plain.train]


def test_answers_that_no_trained_token_ends_are_named_before_training(tmp_path, caplog):
    endless = neutralised(styles.tokenizer("chatml"))
    endless.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert read(tmp_path, pairs(), tokenizer=endless).report["answers_end_in"] is None
    assert "the model never learns to stop" in caplog.text and "model.chat_template=FILE" in caplog.text
    caplog.clear()
    tokenizer = styles.tokenizer("chatml")
    read(tmp_path, pairs(), ends=[tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    assert "answers end in <|im_end|>, at which the model's generation_config does not stop" in caplog.text
    caplog.clear()
    read(tmp_path, pairs(), ends=[tokenizer.eos_token_id])
    assert caplog.text == ""
    read(tmp_path, pairs(), ends=[len(tokenizer) + 7])
    assert f"(it names {len(tokenizer) + 7})" in caplog.text  # of a model whose tokenizer is another one


# --- the prompt beside training --------------------------------------------------------------------------------------


def test_prompts_to_build_from_carry_what_their_row_adds(tmp_path):
    rows = [
        {"prompt": "Rain?", "system": "Be kind."},
        {"prompt": [U], "tools": json.dumps([TOOL])},
        {"prompt": "Plain?"},
    ]
    (first, second, third), _ = read_prompts(write_jsonl(tmp_path / "p.jsonl", rows), data("x"), None)
    assert first == [{"role": "system", "content": "Be kind."}, user("Rain?")]
    assert prompt_of({"prompt": [U], "tools": [TOOL]}) == second and third == "Plain?"
    assert conversation_text(second) == f"tools: {json.dumps(TOOL)}\n\nuser: Rain?"
    shaped = read_prompts(str(tmp_path / "p.jsonl"), data("x", fold_system=True), None)[0][0]
    assert shaped == [user("Be kind.\n\nRain?")]


def test_rows_that_differ_in_their_tools_are_no_copies(tmp_path):
    other = TOOL | {"function": TOOL["function"] | {"name": "add"}}
    rows = [*pairs(tools=[TOOL]), *pairs(tools=[other])]
    assert read(tmp_path, rows).report["copies"]["rows"] == 0
    assert read(tmp_path, [*rows, *pairs(tools=[TOOL])]).report["copies"]["rows"] == 6
    assert len({row["prompt_id"] for row in read(tmp_path, rows, holdout=0.01).train}) > 6
