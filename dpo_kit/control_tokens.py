"""Control tokens that a user typed (`<|im_end|>`) stay text: only the chat template may open and close turns.

transformers can do so where it renders and encodes at once (`sanitize_control_tokens=True`); TRL's ORPO and CPO
trainers render first and encode the text later, and the default is off. A tokenizer from `neutralised` does it in
both cases, for every caller alike: training, probe, sampling. Rows without control tokens take the ordinary way, so
that their ids are untouched. Raw text (no chat template, or `data.wrap_as_chat=false`) is the user's own rendering and
is read as TRL reads it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    _get_control_token_patterns,
    mark_control_tokens,
)

MARKS = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)
"""Private-use characters that transformers sets around a control token which is to be read as text."""


class Neutral:
    """Mixin before a tokenizer's class."""

    def apply_chat_template(self, conversation: Any, *args: Any, tokenize: bool = True, **options: Any) -> Any:
        """As the tokenizer does, with control tokens inside messages as text; without `tokenize`, marked for it."""
        if has_marks(conversation) or count_control_tokens(self, [conversation]):
            if tokenize:
                options.setdefault("sanitize_control_tokens", True)
            else:
                conversation = mark_control_tokens(conversation, _pattern(self))
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **options)  # type: ignore[misc]

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        """As the tokenizer does; a chat with marks, which holds its special tokens already, is encoded by them."""
        if has_marks(text) and not options.get("sanitize_control_tokens"):
            options |= {"sanitize_control_tokens": True, "add_special_tokens": False}
        return super().__call__(text, *args, **options)  # type: ignore[misc]


def neutralised(tokenizer: PreTrainedTokenizerBase) -> Any:
    """`tokenizer` itself, from now on with `Neutral`'s way of reading chats."""
    kind = type(tokenizer)
    tokenizer.__class__ = type(kind.__name__, (Neutral, kind), {"__module__": kind.__module__})
    return tokenizer


def count_control_tokens(tokenizer: Any, inputs: Iterable[Any]) -> Counter[str]:
    """How often each control token stands inside texts, messages or lists of them."""
    pattern = _pattern(tokenizer)
    return Counter(match for text in _texts(list(inputs)) for match in pattern.findall(text))


def has_marks(value: Any) -> bool:
    """Whether any text in `value` holds transformers' marks."""
    return any(mark in text for text in _texts(value) for mark in MARKS)


def _pattern(tokenizer: Any) -> re.Pattern[str]:
    """What matches a control token; kept, since some tokenizers have thousands of added tokens to ask for each row."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    kept = vars(tokenizer).get("_dpo_kit_pattern", (None, None))
    if kept[0] != (template, len(tokenizer)):
        pattern = _get_control_token_patterns(tokenizer._get_control_tokens(template))[0]
        kept = tokenizer._dpo_kit_pattern = ((template, len(tokenizer)), pattern)
    return kept[1]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in _texts(item)]
