"""One row in its normal form, or the reason why it cannot have one.

pairs: prompt, chosen, rejected; unary: prompt, completion, label. Prompt and answers are text, or chat messages.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from dpo_kit.data.read import Fault, Row

Kind = Literal["pairs", "unary"]
ANSWERS: dict[Kind, tuple[str, ...]] = {"pairs": ("chosen", "rejected"), "unary": ("completion",)}
ROLES = ("system", "developer", "user", "assistant", "tool")


def normalise(row: Row, kind: Kind, columns: dict[str, str]) -> Row | Fault:
    """`row` under our column names, with an explicit prompt, every text checked."""
    values = {ours: row.values[theirs] for ours, theirs in columns.items() if theirs in row.values}
    values = {key: value for key, value in row.values.items() if key not in columns.values()} | values
    needed = ANSWERS[kind] + (("prompt", "label") if kind == "unary" else ())
    if missing := [name for name in needed if values.get(name) is None]:
        return Fault(row.place, f"column {missing[0]!r} is missing or null", f"columns {', '.join(values)}")
    if fault := _answer_fault(values, kind):
        return Fault(row.place, *fault)
    if values.get("prompt") is None:
        values |= _implicit_prompt(values)
    if fault := _prompt_fault(values) or _mixed_fault(values, kind) or _label_fault(values, kind):
        return Fault(row.place, *fault)
    return Row(row.place, values)


def _answer_fault(values: dict[str, Any], kind: Kind) -> tuple[str, str] | None:
    for name in ANSWERS[kind]:
        if fault := _text_fault(name, values[name]):
            return fault
        last = values[name] if isinstance(values[name], str) else values[name][-1]
        if not isinstance(last, str) and last["role"] != "assistant":
            return f"{name} does not end with the assistant", last["role"]
    return None


def _prompt_fault(values: dict[str, Any]) -> tuple[str, str] | None:
    return _text_fault("prompt", values["prompt"])


def _text_fault(name: str, value: Any) -> tuple[str, str] | None:
    """Why `value` is neither text nor a list of messages with something in it."""
    if isinstance(value, str):
        return (f"{name} is empty", repr(value[:20])) if not value.strip() else None
    if not isinstance(value, list) or not value:
        return f"{name} is neither text nor a list of messages", f"{type(value).__name__} {str(value)[:40]}"
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"{name} has a message without text content", str(message)[:60]
        if message.get("role") not in ROLES:
            return f"{name} has an unknown role", repr(message.get("role"))
    return (f"{name} is empty", repr(value[-1]["content"][:20])) if not value[-1]["content"].strip() else None


def _mixed_fault(values: dict[str, Any], kind: Kind) -> tuple[str, str] | None:
    kinds = {name: isinstance(values[name], str) for name in ("prompt", *ANSWERS[kind])}
    if len(set(kinds.values())) == 1:
        return None
    return "text and chat messages are mixed", ", ".join(f"{k}: {'text' if v else 'chat'}" for k, v in kinds.items())


def _label_fault(values: dict[str, Any], kind: Kind) -> tuple[str, str] | None:
    if kind == "unary" and not isinstance(values["label"], bool):
        return "label is not true or false", repr(values["label"])
    return None


def _implicit_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """The common beginning of chosen and rejected as the prompt, as TRL takes it."""
    from trl.data_utils import extract_prompt

    if type(values["chosen"]) is not type(values["rejected"]):
        return {"prompt": values["chosen"]}  # reported as mixed
    found = extract_prompt({"chosen": values["chosen"], "rejected": values["rejected"]})
    return {name: found[name] for name in ("prompt", "chosen", "rejected")}


def as_chat(values: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """A text row as one user turn and one assistant turn; a chat row unchanged."""
    if not isinstance(values["prompt"], str):
        return values
    answers = {name: [{"role": "assistant", "content": values[name]}] for name in ANSWERS[kind]}
    return values | {"prompt": [{"role": "user", "content": values["prompt"]}]} | answers


def identify(rows: Iterable[dict[str, Any]], kind: Kind) -> Iterator[dict[str, Any]]:
    """Add `prompt_id` (equal exactly when the prompt is) and `pair_id` (content, and a count where content repeats)."""
    seen: Counter[str] = Counter()
    for values in rows:
        content = digest([values["prompt"], *(values[name] for name in ANSWERS[kind])])
        seen[content] += 1
        pair_id = content if seen[content] == 1 else f"{content}-{seen[content]}"
        yield {"pair_id": pair_id, "prompt_id": digest(values["prompt"])} | values


def digest(value: Any) -> str:
    """A short content hash, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
