"""The token ids of every row, read once: training, probe, store and reports take them from the row."""

from __future__ import annotations

from array import array
from typing import Any

from tqdm import tqdm

from dpo_kit.data.read import Fault
from dpo_kit.data.rows import ANSWERS, Found, Kind
from dpo_kit.data.shape import parts_of
from dpo_kit.run.files import digest

Rows = list[dict[str, Any]]
CHUNK = 1000  # rows that are rendered at once
REFUSED = "the chat template refuses this chat"
FOLD = "data.fold_system=true puts the system turn at the beginning of the first user turn"


def add_ids(rows: Rows, formed: Rows, kind: Kind, tokenizer: Any, faults: list[Fault]) -> None:
    """Give each row `ids`, of its prompt and of each answer, before truncation, and `prompt_id`, equal exactly when the
    prompt is (and an order of prompts at random that is the same on every machine).

    `formed` are the rows as they are trained on. One that the chat template refuses, or leaves a part of out, gets
    neither and is added to `faults`.
    """
    with tqdm(total=len(rows), desc="tokenizing", unit="row", disable=None, leave=False, delay=2) as bar:
        for start in range(0, len(rows), CHUNK):
            part = list(zip(rows[start : start + CHUNK], formed[start : start + CHUNK], strict=True))
            whole = []
            for row, shape in part:
                if fault := _left_out(shape, kind, tokenizer):
                    faults.append(Fault(row["_place"], *fault))
                else:
                    whole.append((row, shape))
            _add(whole, kind, tokenizer, faults)
            bar.update(len(part))


def _add(part: list[tuple[dict[str, Any], dict[str, Any]]], kind: Kind, tokenizer: Any, faults: list[Fault]) -> None:
    from dpo_kit.model.tokens import encode_rows

    answers = [[shape[name] for name in ANSWERS[kind]] for _, shape in part]
    try:
        encoded = encode_rows(tokenizer, [shape["prompt"] for _, shape in part], answers)
    except Exception as error:  # a template is somebody's program and may raise anything: which row is it?
        if len(part) > 1:
            for pair in part:
                _add([pair], kind, tokenizer, faults)
        else:
            row, shape = part[0]
            faults.append(Fault(row["_place"], REFUSED, *_why(shape, error)))
        return
    for (row, shape), (prompt, ids) in zip(part, encoded, strict=True):
        row["prompt_id"] = digest(shape["prompt"])
        row["ids"] = {
            name: array("i", own) for name, own in zip(("prompt", *ANSWERS[kind]), (prompt, *ids), strict=True)
        }


def _why(shape: dict[str, Any], error: Exception) -> tuple[str, str]:
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    remedy = "mend its turns, or take another template with model.chat_template=FILE"
    return said, f"{FOLD}; or {remedy}" if shape["prompt"][0]["role"] == "system" else remedy


def _left_out(shape: dict[str, Any], kind: Kind, tokenizer: Any) -> Found | None:
    """A part of a chat that the template passes over, so that nobody would be trained on what the row says."""
    from dpo_kit.model.turns import leaves_out

    if isinstance(shape["prompt"], str):
        return None
    part = next((part for part in parts_of(shape, kind) if leaves_out(tokenizer, part)), None)
    if part is None:
        return None
    remedy = "take a template that writes it (model.chat_template=FILE), or take it out of the row"
    return f"the chat template leaves out {part}", "in silence", f"{FOLD}; or {remedy}" if part == "system" else remedy
