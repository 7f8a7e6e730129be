"""The token ids of every row, read once: training, probe, store and reports take them from the row."""

from __future__ import annotations

from array import array
from typing import Any

from dpo_kit.data.read import Fault
from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.run.files import digest
from dpo_kit.run.quiet import bar

CHUNK = 1000  # rows that are rendered at once
FOLD = "data.fold_system=true puts the system turn at the beginning of the first user turn"
Formed = tuple[dict[str, Any], dict[str, Any]]  # a row, and the same as it is trained on


def add_ids(rows: Rows, formed: Rows, kind: Kind, tokenizer: Any, faults: list[Fault]) -> None:
    """Give each row `ids`, of its prompt and of each answer, before truncation, and `prompt_id`, equal exactly when the
    prompt is (and an order of prompts at random that is the same on every machine).

    `formed` are the rows as they are trained on. One that the chat template refuses, or leaves a part of out, gets
    neither and is added to `faults`.
    """
    both = list(zip(rows, formed, strict=True))
    with bar(len(rows), "tokenizing", "row") as progress:
        for start in range(0, len(rows), CHUNK):
            part = both[start : start + CHUNK]
            _add([each for each in part if not _is_cut_short(*each, kind, tokenizer, faults)], kind, tokenizer, faults)
            progress.update(len(part))


def _is_cut_short(row: dict[str, Any], shape: dict[str, Any], kind: Kind, tokenizer: Any, faults: list[Fault]) -> bool:
    """Whether the template passes over a part of a chat, so that nobody would be trained on what the row says."""
    from dpo_kit.model.turns import PARTS, leaves_out

    if isinstance(shape["prompt"], str):
        return False
    messages = [message for name in ("prompt", *ANSWERS[kind]) for message in shape[name]]
    parts = [part for part in PARTS if any(message.get(part) or message["role"] == part for message in messages)]
    part = next((part for part in parts if leaves_out(tokenizer, part)), None)
    if part is not None:
        remedy = "take a template that writes it (model.chat_template=FILE), or take it out of the row"
        remedy = f"{FOLD}; or {remedy}" if part == "system" else remedy
        faults.append(Fault(row["_place"], f"the chat template leaves out {part}", "in silence", remedy))
    return part is not None


def _add(part: list[Formed], kind: Kind, tokenizer: Any, faults: list[Fault]) -> None:
    from dpo_kit.model.tokens import encode_rows

    names = ("prompt", *ANSWERS[kind])
    answers = [[shape[name] for name in ANSWERS[kind]] for _, shape in part]
    try:
        encoded = encode_rows(tokenizer, [shape["prompt"] for _, shape in part], answers)
    except Exception as error:  # a template is somebody's program and may raise anything: which row is it?
        if len(part) > 1:
            for pair in part:
                _add([pair], kind, tokenizer, faults)
            return
        row, shape = part[0]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        remedy = "mend its turns, or take another template with model.chat_template=FILE"
        remedy = f"{FOLD}; or {remedy}" if shape["prompt"][0]["role"] == "system" else remedy
        faults.append(Fault(row["_place"], "the chat template refuses this chat", reason, remedy))
        return
    for (row, shape), (prompt, completions) in zip(part, encoded, strict=True):
        row["prompt_id"] = digest(shape["prompt"])
        row["ids"] = {name: array("i", ids) for name, ids in zip(names, (prompt, *completions), strict=True)}
