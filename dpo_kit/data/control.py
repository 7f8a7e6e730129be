"""What the text of rows may do to a chat: control tokens in it, and a template that takes offence at it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from dpo_kit.data.rows import ANSWERS, Kind

log = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
TRIED = 1000  # of the longest chats, and as many spread over the others


def try_template(rows: Rows, kind: Kind, tokenizer: Any) -> None:
    """ModelError where the chat template is hostile to chats of `rows`: the longest, and some of all others."""
    from dpo_kit.template import refuse_hostile_template

    chats = sorted((row for row in rows if not isinstance(row["prompt"], str)), key=_length, reverse=True)
    chats = chats[:TRIED] + chats[TRIED :: max(1, len(chats) // TRIED)]
    prompts = [(row["prompt"], True) for row in chats]
    wholes = [([*row["prompt"], *row[name]], False) for row in chats for name in ANSWERS[kind]]
    refuse_hostile_template(tokenizer, [*prompts, *wholes])


def count_in_rows(rows: Rows, kind: Kind, tokenizer: Any) -> dict[str, Any]:
    """How many rows hold control tokens in their text, which ones, and how they are read; said in the log too."""
    from dpo_kit.control_tokens import count_control_tokens

    counts = [count_control_tokens(tokenizer, _texts_of(row, kind, tokenizer.eos_token)) for row in rows]
    found: Counter[str] = sum((count for count in counts if count), Counter())
    held, chats = sum(map(bool, counts)), any(not isinstance(row["prompt"], str) for row in rows)
    if found:
        log.warning(
            "%d rows hold control tokens in their text (%s; the first is %s); they are read as %s%s",
            *(held, ", ".join(found), next(row["_place"] for row, count in zip(rows, counts, strict=True) if count)),
            "text" if chats else "tokens",
            "" if chats else ", since raw text is taken as rendered already: for text as typed, data.wrap_as_chat=true",
        )
    return {"rows": held, "tokens": dict(found), "read_as": "text" if chats else "tokens"}


def _length(row: dict[str, Any]) -> int:
    return sum(len(str(row[name])) for name in row if name in ("prompt", "chosen", "rejected", "completion"))


def _texts_of(row: dict[str, Any], kind: Kind, eos: str) -> list[Any]:
    """The texts of a row; of raw answers without the EOS that ends them."""
    answers = [row[name] for name in ANSWERS[kind]]
    return [row["prompt"], *(text.removesuffix(eos) if isinstance(text, str) else text for text in answers)]
