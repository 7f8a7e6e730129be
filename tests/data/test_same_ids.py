"""Whatever a chat holds, and whatever the template: the ids are those of `apply_chat_template` on an untouched
tokenizer, and every method's trainer, the probe and the store get the very same.
"""

import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_kit.data.shape import add_ids
from dpo_kit.model.chats import prompt_of
from dpo_kit.model.tokens import encode_prompts, encode_rows, ids_of_rows
from dpo_kit.model.turns import neutralised, turns_of
from dpo_kit.trainer.rows import GivenTokens, build_dataset
from tests import styles

WORDS = [
    "rain",
    " the",
    "Spain",
    "a",
    "дождь",
    "雨が",
    "المطر",
    "नमस्ते",
    "🙂",
    "é",
    "\u0301",
    "x = {y}",
    '"',
    "'",
    "\\n",
    "##",
    "-1.5e3",
]
SPACE = [" ", "  ", "\n", "\n\n", "\t", " \n ", "\u00a0", "\r\n", ""]
TOWN = {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}, "required": ["town"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": TOWN}}


def texts(extra=(), least=1):
    pieces = st.sampled_from([*WORDS, *SPACE, *extra])
    return st.lists(pieces, min_size=least, max_size=8).map("".join).filter(lambda text: text.strip())


@cache
def plain_of(style):
    return styles.tokenizer(style)


@cache
def neutral_of(style):
    return neutralised(styles.tokenizer(style))


def chats(style):
    """Rows of TRL's form that the template of `style` takes, every other one with control tokens in any text."""
    return st.booleans().flatmap(lambda typed: rows_of(style, typed))


def rows_of(style, typed):
    _, _, _, special, other = styles.STYLES[style]
    takes, tokens = styles.TAKES[style], [*special, *other] if typed else []
    own = [token for token in other if token.strip()]  # what the model writes itself
    asked = texts(tokens).map(lambda text: {"role": "user", "content": text})

    @st.composite
    def said(draw, alone=False):
        text = draw(texts([*own, *(tokens if draw(st.integers(0, 3)) == 0 else [])]))
        if not alone and draw(st.booleans()):
            text = f"<think>{draw(st.sampled_from(SPACE))}{draw(texts())}\n</think>{draw(st.sampled_from(SPACE))}{text}"
        message = {"role": "assistant", "content": text}
        if "reasoning_content" in takes and "<think>" not in text and draw(st.booleans()):
            message["reasoning_content"] = draw(texts())
        return message

    @st.composite
    def call(draw):
        arguments = {"town": draw(texts(tokens)), **draw(st.sampled_from([{}, {"days": 2}]))}
        function = {"name": "weather", "arguments": arguments}
        return {
            "role": "assistant",
            "content": draw(st.sampled_from([None, ""])),
            "tool_calls": [{"type": "function", "function": function}],
        }

    @st.composite
    def row(draw):
        with_tools = "tools" in takes and draw(st.booleans())
        prompt = (
            [{"role": "system", "content": draw(texts(tokens))}] if "system" in takes and draw(st.booleans()) else []
        )
        for _ in range(draw(st.integers(0, 2))):
            prompt += [draw(asked), draw(said())]
        prompt.append(draw(asked))
        if with_tools and draw(st.booleans()):
            prompt += [draw(call()), {"role": "tool", "name": "weather", "content": draw(texts(tokens))}]
        answer = st.one_of(said(), call()) if with_tools else said()
        made = {"prompt": prompt, "chosen": [draw(answer)], "rejected": [draw(answer)]}
        if with_tools:
            made["tools"] = [TOOL]
        if style == "qwen3" and draw(st.booleans()):
            made["chat_template_kwargs"] = {"enable_thinking": draw(st.booleans())}
        return made

    return row()


def held(value):
    """All texts of a chat as one."""
    return json.dumps(value, ensure_ascii=False)


def truth(plain, row, name, **options):
    kwargs = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
    return plain.apply_chat_template(row["prompt"] + row[name], **kwargs, **options)


def check(style, row):
    """The ids of `row` against an untouched tokenizer; how they could be told."""
    plain, tokenizer = plain_of(style), neutral_of(style)
    ((prompt, answers),) = encode_rows(tokenizer, [prompt_of(row)], [[row["chosen"], row["rejected"]]])
    controls = re.compile("|".join(map(re.escape, plain._get_control_tokens(plain.chat_template))))
    turns = re.compile(
        "|".join(map(re.escape, sorted({*turns_of(plain).tokens, plain.eos_token, plain.bos_token or plain.eos_token})))
    )
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        messages = row["prompt"] + row[name]
        others = [each for each in messages if each["role"] != "assistant"]
        model = [each for each in messages if each["role"] == "assistant"]
        if not controls.search(held([others, row.get("tools")])) and not turns.search(held(model)):
            assert prompt + answer == truth(plain, row, name)["input_ids"]
            yield "as apply_chat_template"
        elif not controls.search(held(model)):
            assert prompt + answer == truth(plain, row, name, sanitize_control_tokens=True)["input_ids"]
            yield "as transformers neutralises"
        else:
            opened = [token for token in prompt + answer if turns.fullmatch(plain.convert_ids_to_tokens(token))]
            bare = json.loads(controls.sub("x", held(row)))
            assert opened == [
                token
                for token in truth(plain, bare, name)["input_ids"]
                if turns.fullmatch(plain.convert_ids_to_tokens(token))
            ]
            yield "as many turns"


QUICK = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@pytest.mark.parametrize("style", styles.STYLES)
def test_of_ten_thousand_random_rows_all_have_the_template_s_ids_for_all_methods_and_the_probe(style):
    told = {"as apply_chat_template": 0, "as transformers neutralises": 0, "as many turns": 0}
    rows = []

    def one(row):
        for how in check(style, row):
            told[how] += 1
        rows.append(row)

    MANY(given(chats(style))(one))()
    assert len(rows) >= 1000 and told["as apply_chat_template"] > 1000
    same_for_all(style, rows)


@pytest.mark.parametrize("style", styles.STYLES)
def test_all_methods_and_the_probe_read_the_ids_of_the_template_on_an_untouched_tokenizer(style):
    rows = []
    QUICK(given(chats(style))(lambda row: rows.append(row) or (list(check(style, row)) and None)))()
    same_for_all(style, rows)


def same_for_all(style, rows):
    tokenizer = neutral_of(style)
    formed = [{name: row[name] for name in ("chosen", "rejected")} | {"prompt": prompt_of(row)} for row in rows]
    values = [dict(row) | {"_place": f"row {index}"} for index, row in enumerate(rows)]
    faults = []
    add_ids(values, formed, "pairs", tokenizer, faults)
    assert faults == []
    probed = ids_of_rows(tokenizer, values, ("chosen", "rejected"))
    assert probed == encode_rows(
        tokenizer, [row["prompt"] for row in formed], [[row["chosen"], row["rejected"]] for row in formed]
    )
    pairs = trainer().given(build_dataset(values, "pairs"))
    assert [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in pairs] == probed
    whole = [trainer(max_length=10**6).tokenize_row(row) for row in build_dataset(values, "pairs")]
    for row, (prompt, answers) in zip(whole, probed, strict=True):
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            assert row[f"{name}_input_ids"] == prompt + answer
            assert row[f"{name}_labels"] == [-100] * len(prompt) + answer
    asked = encode_prompts(tokenizer, [row["prompt"] for row in formed])
    plain = plain_of(style)
    for row, ids, (prompt, _) in zip(rows, asked, probed, strict=True):
        assert ids[: len(prompt)] == prompt
        if not re.search("|".join(map(re.escape, plain._get_control_tokens(plain.chat_template))), held(row)):
            kwargs = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
            assert ids == plain.apply_chat_template(row["prompt"], add_generation_prompt=True, **kwargs)["input_ids"]


def trainer(**own):
    """What TRL's trainers have of `GivenTokens`, without a model."""
    made = GivenTokens()
    vars(made).update(own)
    made.given = lambda rows: made._prepare_dataset(rows, None, SimpleNamespace(per_device_train_batch_size=2), "train")
    return made
