"""The columns of a row that belong to its prompt, beside the prompt itself; and those that cannot be trained on."""

from __future__ import annotations

import json
from typing import Any

from dpo_kit.data.read import UnfitError
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
    """`tools` and `chat_template_kwargs` of a row, from values or JSON text, where it has them. Raises UnfitError."""
    context: dict[str, Any] = {name: row[name] for name in CONTEXT if row.get(name) not in (None, "")}
    for name, given in context.items():
        try:
            context[name] = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise _no_context(f"{name} is text that is no JSON ({error})", row) from error
    tools, kwargs = context.get("tools") or [], context.get("chat_template_kwargs") or {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _no_context("tools is no list of functions", row)
    if not isinstance(kwargs, dict):
        raise _no_context("chat_template_kwargs is no object of names and values", row)
    if taken := sorted(kwargs.keys() & {*TAKEN}):
        raise _no_context(f"chat_template_kwargs has {taken[0]}, which is no variable of a template", row)
    return {name: value for name, value in context.items() if value is not None}


def _no_context(reason: str, row: dict[str, Any]) -> UnfitError:
    columns = [row[name] for name in CONTEXT if row.get(name)]
    return UnfitError(reason, str(columns)[:60], "write it as TRL takes it")


def refuse_context(row: dict[str, Any]) -> None:
    """UnfitError where the columns beside prompt and answers cannot be trained on."""
    if media := next((name for name in MEDIA if row.get(name)), None):
        remedy = "only text is trained: leave the row out, or take the column away where the text does without it"
        raise UnfitError(f"{media} cannot be trained on", str(row[media])[:40], remedy)
    system, prompt = row.get("system") or "", row.get("prompt")
    if not isinstance(system, str):
        raise UnfitError("system is not text", str(system)[:40], "write it as text")
    if system and isinstance(prompt, list) and prompt[0]["role"] == "system" and prompt[0]["content"] != system:
        raise UnfitError(
            "there are two system turns", "in the column system and in the prompt", "leave one of them out"
        )
    read_context(row)
