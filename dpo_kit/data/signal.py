"""Token counts of every row, and the rows that could move no weight."""

from __future__ import annotations

from typing import Any

from dpo_kit.data.read import Fault
from dpo_kit.data.rows import ANSWERS, Kind

Rows = list[dict[str, Any]]
SAME, SAME_WHEN_CUT, NO_ROOM = (
    "chosen and rejected are identical",
    "identical after truncation to max_length",
    "prompt fills max_length",
)


def keep_signal(rows: Rows, kind: Kind, max_length: int | None, truncation: str, faults: list[Fault]) -> Rows:
    """The rows that can move a weight, each with `tokens` (counts, and whether an answer is cut); the others are added
    to `faults`.
    """
    kept = []
    for row in rows:
        prompt, *answers = (row["ids"][name].tolist() for name in ("prompt", *ANSWERS[kind]))
        cut = [_cut(prompt, answer, max_length, truncation) for answer in answers]
        if reason := _no_signal(answers, cut):
            remedy = "dropped always: such a row has no gradient" if reason != NO_ROOM else "raise trl.max_length"
            faults.append(Fault(row["_place"], reason, f"{len(prompt)} prompt tokens", remedy))
        else:
            lengths = {"prompt": len(prompt), **{k: len(ids) for k, ids in zip(ANSWERS[kind], answers, strict=True)}}
            row["tokens"] = lengths | {"cut": cut != answers}
            kept.append(row)
    return kept


def _cut(prompt: list[int], answer: list[int], max_length: int | None, truncation: str) -> list[int]:
    from dpo_kit.model.tokens import truncate

    return answer[-(max_length or 0) :] if truncation == "keep_end" else truncate(prompt, answer, max_length)


def _no_signal(answers: list[list[int]], cut: list[list[int]]) -> str | None:
    if not all(cut):
        return NO_ROOM
    if len(answers) == 2 and answers[0] == answers[1]:
        return SAME
    if len(cut) == 2 and cut[0] == cut[1]:
        return SAME_WHEN_CUT
    return None
