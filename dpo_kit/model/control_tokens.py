"""Control tokens in the text of a chat: those that somebody typed stay text, those that a model writes are tokens.

Only the chat template may open and close turns. So every control token (`<|im_end|>`) in what users, systems and tools
say is read as text, and in what assistants say those that would open or end a turn; `<think>` or `<tool_call>` there is
what the model itself writes. transformers' `sanitize_control_tokens=True` makes text of those too
(huggingface/trl#6361), so that texts are marked here and encoded by transformers. A tokenizer reads so from
`neutralised` on. Raw text (no chat template, or `data.wrap_as_chat=false`) is the user's own rendering and is read as
TRL reads it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START, mark_control_tokens

from dpo_kit.model.chats import Messages, split_context
from dpo_kit.model.turns import control_pattern, turn_pattern

MARKS = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)
"""Private-use characters that transformers sets around a control token which is to be read as text."""


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
