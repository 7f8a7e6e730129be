"""Prompts whose answers are drawn while training: each once, with room for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_kit.data.read import Fault
from dpo_kit.data.rows import Rows


def distinct_prompts(rows: Rows) -> Rows:
    """The first row of each prompt, in their order."""
    return list({row["prompt_id"]: row for row in reversed(rows)}.values())[::-1]


def as_prompts(rows: Rows, tokenizer: Any, room: int | None, faults: list[Fault]) -> Rows:
    """`rows` without their answers; prompts of more than `room` tokens, as a model is asked them, go to `faults`.

    TRL would cut such a prompt in the loss, but not where it draws the answer.
    """
    from dpo_kit.model.tokens import encode_prompts

    kept = []
    for row, ids in zip(rows, encode_prompts(tokenizer, [row["prompt"] for row in rows]), strict=True):
        if room is not None and len(ids) > room:
            remedy = f"at most {room} fit: raise trl.max_length, or lower trl.max_new_tokens"
            faults.append(
                Fault(row["_place"], "prompt leaves no room for an answer", f"{len(ids)} prompt tokens", remedy)
            )
        else:
            bare = {name: row[name] for name in ("prompt", "prompt_id", "_place")}
            kept.append(bare | {"tokens": {"prompt": len(ids), "cut": False}})
    return kept


def with_answer_lengths(rows: Sequence[dict[str, Any]], max_new_tokens: int | None) -> Rows:
    """`rows` whose token counts include their answers: of those that are drawn, two of the longest that may be."""
    fresh = {"first": max_new_tokens, "second": max_new_tokens}
    return [
        row if row["tokens"].keys() - {"prompt", "cut"} else row | {"tokens": row["tokens"] | fresh} for row in rows
    ]
