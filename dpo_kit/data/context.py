"""The columns of a row that belong to its prompt, beside the prompt itself; and those that cannot be trained on."""

from __future__ import annotations

import json
from typing import Any

from dpo_kit.model.chats import CONTEXT

BESIDE = ("system", *CONTEXT)
"""Columns that go into a chat beside prompt and answers; raw text has no place for them."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
LIKELY = ("input", "context", "history", "instruction", "question", "query", "documents", "passage", "system_prompt")
"""Names under which other columns usually hold a part of the prompt."""
TAKEN = ("tools", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
         "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
         "return_assistant_tokens_mask", "tokenizer_kwargs")  # fmt: skip
"""Parameters of apply_chat_template that are no variables of a template."""


def read_context(row: dict[str, Any]) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs` of a row, from values or JSON text, where it has them. Raises ValueError."""
    context = {name: _read(name, row[name]) for name in CONTEXT if row.get(name) not in (None, "")}
    return {name: value for name, value in context.items() if value is not None}


def _read(name: str, given: Any) -> Any:
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"{name} is text that is no JSON ({error})") from error
    if name == "tools" and not (isinstance(value or [], list) and all(isinstance(tool, dict) for tool in value or ())):
        raise ValueError("tools is no list of functions")
    if name == "chat_template_kwargs" and not isinstance(value or {}, dict):
        raise ValueError("chat_template_kwargs is no object of names and values")
    if name == "chat_template_kwargs" and (taken := sorted(set(value or ()) & set(TAKEN))):
        raise ValueError(f"chat_template_kwargs has {taken[0]}, which is no variable of a template")
    return value


def context_fault(row: dict[str, Any]) -> tuple[str, str, str] | None:
    """Why the columns beside prompt and answers cannot be trained on: reason, what was found, what to do."""
    if media := next((name for name in MEDIA if row.get(name)), None):
        remedy = "only text is trained: leave the row out, or take the column away where the text does without it"
        return f"{media} cannot be trained on", str(row[media])[:40], remedy
    system, prompt = row.get("system") or "", row.get("prompt")
    if not isinstance(system, str):
        return "system is not text", str(system)[:40], "write it as text"
    if system and isinstance(prompt, list) and prompt[0]["role"] == "system" and prompt[0]["content"] != system:
        return "there are two system turns", "in the column system and in the prompt", "leave one of them out"
    try:
        read_context(row)
    except ValueError as error:
        return str(error), str([row[name] for name in CONTEXT if row.get(name)])[:60], "write it as TRL takes it"
    return None
