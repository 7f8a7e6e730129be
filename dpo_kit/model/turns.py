"""Control tokens of chats: those that a template writes around turns, learned from a few plain chats that it renders
(what opens and ends a turn, and an answer; what the template leaves out); and those that somebody typed.

Only the chat template may open and close turns. So every control token (`<|im_end|>`) in what users, systems and tools
say is read as text, and in what assistants say those that would open or end a turn; `<think>` or `<tool_call>` there is
what the model itself writes. transformers' `sanitize_control_tokens=True` makes text of those too
(huggingface/trl#6361), so that texts are marked here and encoded by transformers. A tokenizer reads so from
`neutralised` on. Raw text (no chat template, or `data.wrap_as_chat=false`) is the user's own rendering and is read as
TRL reads it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    _get_control_token_patterns,
    mark_control_tokens,
)

from dpo_kit.model.chats import Messages, split_context

MARKS = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)
"""Private-use characters that transformers sets around a control token which is to be read as text."""
ASKED, SAID, NEXT = "alpha", "omega", "sigma"  # words that stand for what is said in the chats that are tried
QUESTION, ANSWER = {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}
CALL: dict[str, Any] = {"type": "function", "function": {"name": SAID, "arguments": {}}}
TOOL: dict[str, Any] = {"name": SAID, "description": SAID, "parameters": {"type": "object", "properties": {}}}
PARTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "system": ([{"role": "system", "content": SAID}, QUESTION], {}),
    "tools": ([QUESTION], {"tools": [{"type": "function", "function": TOOL}]}),
    "tool_calls": ([QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], {}),
    "reasoning_content": ([QUESTION, {"role": "assistant", "content": NEXT, "reasoning_content": SAID}], {}),
}
"""Chats in which `SAID` stands in that part alone."""
PLAIN = ([QUESTION], [QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION | {"content": NEXT}])


@dataclass(frozen=True)
class Turns:
    """The control tokens that open or end a turn, and the one that ends an answer; None where the template has none."""

    tokens: frozenset[str]
    end: str | None


def turns_of(tokenizer: Any) -> Turns:
    """What the template of `tokenizer` writes around turns; kept with it. A template that refuses the plain chats is
    taken to end answers as the tokenizer ends texts.
    """
    return _kept(tokenizer, "turns", _learn)


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """What matches a control token; kept, since some tokenizers have thousands of added tokens to ask for each row."""
    return _kept(tokenizer, "pattern", lambda own: pattern_of(own._get_control_tokens(_template(own))))


def turn_pattern(tokenizer: Any) -> re.Pattern[str]:
    """What matches a control token that would open or end a turn; kept as well."""
    return _kept(tokenizer, "turn_pattern", lambda own: pattern_of(outer_tokens(own)))


def pattern_of(tokens: Any) -> re.Pattern[str]:
    """What matches any of `tokens`, the longest first."""
    return _get_control_token_patterns(tuple(sorted(tokens)))[0]


def leaves_out(tokenizer: Any, part: str) -> bool:
    """Whether the template passes over a `part` of `PARTS` in silence. One that it refuses is not left out."""

    def passes_over(own: Any) -> bool:
        messages, context = PARTS[part]
        with suppress(Exception):  # a template may raise anything; so it will on the rows, which are then named
            return SAID not in own.apply_chat_template(messages, tokenize=False, **context)
        return False

    return _kept(tokenizer, part, passes_over)


def written_today(tokenizer: Any) -> list[Any]:
    """What answers that are kept depend on beside weights and prompt: the template, and what it writes on this day."""
    today = None
    with suppress(Exception):  # a template may raise anything
        today = tokenizer.apply_chat_template(PLAIN[0], tokenize=False) if tokenizer.chat_template else None
    return [tokenizer.chat_template, today]


def stop_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, the template's own end, those of the model's configs."""
    end = turns_of(tokenizer).end
    own = [tokenizer.eos_token_id, *([] if end is None else [tokenizer.convert_tokens_to_ids(end)])]
    configs = [] if model is None else [model.config.get_text_config(), model.generation_config]
    named = [token for config in (tokenizer, *configs) for token in ends_of(config)]
    return sorted({*own, *named} - {None})


def ends_of(config: Any) -> list[int]:
    """`eos_token_id` of a config, one, several or none; or those of its model that a tokenizer was told."""
    ends = vars(config).get("ends_of_model", getattr(config, "eos_token_id", None))
    return [] if ends is None else [ends] if isinstance(ends, int) else ends


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Those of `stop_ids` that the tokenizer knows, as text."""
    return tuple(filter(None, tokenizer.convert_ids_to_tokens(stop_ids(tokenizer))))


def outer_tokens(tokenizer: Any) -> set[str]:
    """Control tokens that are no part of an answer's text: those of turns, and with which texts begin, end and pad."""
    own = (tokenizer.bos_token, tokenizer.pad_token)
    return {*turns_of(tokenizer).tokens, *end_tokens(tokenizer), *filter(None, own)}


def _learn(tokenizer: Any) -> Turns:
    if not tokenizer.chat_template:
        return Turns(frozenset(), None)
    unknown = Turns(frozenset(), tokenizer.eos_token)
    try:
        asked, answered, again = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in PLAIN)
    except Exception:  # a template may raise anything
        return unknown
    if ASKED not in asked or SAID not in answered or SAID not in again:
        return unknown
    pieces, is_control = control_pattern(tokenizer).findall, control_pattern(tokenizer).fullmatch
    split = re.compile(f"({control_pattern(tokenizer).pattern})").split
    after, between = split(asked.rpartition(ASKED)[2]), split(again.partition(ASKED)[2].partition(SAID)[0])
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(after, between, strict=False)))
    opening = next(filter(is_control, between[same:]), None)  # what follows it, such as <think>, is the model's own
    ending = pieces(answered.rpartition(SAID)[2])
    of_turns = {*pieces(asked), opening, *ending, *pieces(again.partition(SAID)[2].partition(NEXT)[0])}
    with suppress(Exception):  # many templates know no system turn
        of_turns |= {*pieces(tokenizer.apply_chat_template(PARTS["system"][0], tokenize=False))}
    return Turns(frozenset(filter(None, of_turns)), ending[0] if ending else None)


def _template(tokenizer: Any) -> str:
    return tokenizer.get_chat_template() if tokenizer.chat_template else ""


def _kept(tokenizer: Any, name: str, find: Any) -> Any:
    """What `find` says of the tokenizer, asked again only where its template, vocabulary or ends have changed."""
    state = (_template(tokenizer), len(tokenizer), tuple(ends_of(tokenizer)))
    kept = vars(tokenizer).setdefault("_dpo_kit", {})
    if kept.get(name, (None, None))[0] != state:
        kept[name] = (state, find(tokenizer))
    return kept[name][1]


def neutralised(tokenizer: Any, ends_of_model: list[int] | None = None) -> Any:
    """`tokenizer` itself, which from now on reads chats as this module says, and ends where its model's answers do."""
    tokenizer.reads_typed_tokens_as_text, tokenizer.ends_of_model = True, ends_of_model or []
    return tokenizer


def is_neutral(tokenizer: Any) -> bool:
    return bool(vars(tokenizer).get("reads_typed_tokens_as_text"))


def neutral_chat(tokenizer: Any, chat: Messages) -> tuple[Messages, dict[str, Any]]:
    """The messages of `chat` and its context (`split_context`), with marks where control tokens are to stay text."""
    messages, context = split_context(chat)
    if not is_neutral(tokenizer):
        return messages, context
    typed, turns = control_pattern(tokenizer), turn_pattern(tokenizer)
    if any(typed.search(text) for text in texts_in([messages, context])) or has_marks([messages, context]):
        messages = [mark_control_tokens(each, turns if each["role"] == "assistant" else typed) for each in messages]
        context = mark_control_tokens(context, typed)
    return messages, context


def count_control_tokens(tokenizer: Any, chat: Messages) -> tuple[Counter[str], Counter[str]]:
    """How often each control token stands in a chat's text: those that are read as text, and the model's own."""
    messages, context = split_context(chat)
    typed, turns = control_pattern(tokenizer), turn_pattern(tokenizer)
    by_model = [text for each in messages if each["role"] == "assistant" for text in texts_in(each)]
    others = texts_in([context, *(each for each in messages if each["role"] != "assistant")])
    held = Counter(token for text in by_model for token in typed.findall(text))
    as_text = Counter(token for text in by_model for token in turns.findall(text))
    return as_text + Counter(token for text in others for token in typed.findall(text)), held - as_text


def has_marks(value: Any) -> bool:
    """Whether any text in `value` holds transformers' marks."""
    return any(mark in text for text in texts_in(value) for mark in MARKS)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in nested lists and dicts, keys apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
