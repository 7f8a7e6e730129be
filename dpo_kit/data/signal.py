"""Token counts of every row, and the rows that could move no weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from dpo_kit.data.read import Fault
from dpo_kit.data.rows import ANSWERS, Kind, digest

Rows = list[dict[str, Any]]
CHUNK = 1000  # rows whose token ids are in memory at once
SAME, SAME_WHEN_CUT, NO_ROOM = (
    "chosen and rejected are identical",
    "identical after truncation to max_length",
    "prompt fills max_length",
)


def keep_signal(
    rows: Rows,
    kind: Kind,
    tokenizer: Any,
    max_length: int | None,
    truncation: str,
    faults: list[Fault],
    form: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
) -> Rows:
    """The rows that can move a weight; the others are added to `faults`.

    Each row gets `tokens` (counts, and whether an answer is cut) and `prompt_id` (equal exactly when the prompt is, and
    an order of prompts at random that is the same on every machine). `form` gives a row as it is trained on.
    """
    kept = []
    for row, formed, prompt, answers in _encoded(rows, kind, tokenizer, form):
        cut = [_cut(prompt, answer, max_length, truncation) for answer in answers]
        if reason := _no_signal(answers, cut):
            remedy = "dropped always: such a row has no gradient" if reason != NO_ROOM else "raise trl.max_length"
            faults.append(Fault(row["_place"], reason, f"{len(prompt)} prompt tokens", remedy))
        else:
            lengths = {"prompt": len(prompt), **{k: len(ids) for k, ids in zip(ANSWERS[kind], answers, strict=True)}}
            row["tokens"] = lengths | {"cut": cut != answers}
            row["prompt_id"] = digest(formed["prompt"])
            kept.append(row)
    return kept


def _encoded(
    rows: Rows, kind: Kind, tokenizer: Any, form: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[int], list[list[int]]]]:
    """Each row, as it is trained on, and its token ids; a bar on a terminal where it takes long."""
    from dpo_kit.tokens import encode_rows

    with tqdm(total=len(rows), desc="tokenizing", unit="row", disable=None, leave=False, delay=2) as bar:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            formed = [form(row) for row in part]
            answers = [[row[name] for name in ANSWERS[kind]] for row in formed]
            for row, shape, ids in zip(
                part, formed, encode_rows(tokenizer, [row["prompt"] for row in formed], answers), strict=True
            ):
                yield row, shape, *ids
            bar.update(len(part))


def _cut(prompt: list[int], answer: list[int], max_length: int | None, truncation: str) -> list[int]:
    from dpo_kit.tokens import truncate

    return answer[-(max_length or 0) :] if truncation == "keep_end" else truncate(prompt, answer, max_length)


def _no_signal(answers: list[list[int]], cut: list[list[int]]) -> str | None:
    if not all(cut):
        return NO_ROOM
    if len(answers) == 2 and answers[0] == answers[1]:
        return SAME
    if len(cut) == 2 and cut[0] == cut[1]:
        return SAME_WHEN_CUT
    return None
