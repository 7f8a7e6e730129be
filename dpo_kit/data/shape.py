"""A row as it is trained on: text or chat, with the columns that belong to its prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.data.context import BESIDE, TAKEN, read_context
from dpo_kit.data.rows import ANSWERS, Kind
from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.model.chats import Messages, as_messages, split_context, with_context


@dataclass(frozen=True)
class Shape:
    """How rows become what is trained on. `ends`: tokens that end an answer, cut off where its text has them already,
    since the template writes them.
    """

    wrap: bool  # text rows become a user turn and an assistant turn
    fold_system: bool = False  # a system turn becomes the beginning of the first user turn
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # of all rows; a row's own come first
    ends: tuple[str, ...] = ()

    def of(self, row: dict[str, Any], kind: Kind) -> dict[str, Any]:
        """`row` with prompt and answers in this shape; the columns that went into the prompt are gone."""
        if self.wrap and isinstance(row["prompt"], str):
            answers = {name: [{"role": "assistant", "content": row[name]}] for name in ANSWERS[kind]}
            row = row | {"prompt": as_messages(row["prompt"])} | answers
        if isinstance(row["prompt"], str):
            return row
        chats = {name: [self._without_end(message) for message in row[name]] for name in ("prompt", *ANSWERS[kind])}
        chats["prompt"] = self.prompt(chats["prompt"], row)
        return {name: value for name, value in row.items() if name not in BESIDE} | chats

    def prompt(self, prompt: Messages, row: dict[str, Any]) -> Any:
        """A chat prompt with what the columns of `row` add to it."""
        prompt, context = split_context(prompt)
        system, context = row.get("system"), context | read_context(row)
        if system and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        if self.fold_system and [message["role"] for message in prompt[:2]] == ["system", "user"]:
            system, user, *rest = prompt
            prompt = [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]
        if kwargs := self.template_kwargs | context.pop("chat_template_kwargs", {}):
            context["chat_template_kwargs"] = kwargs
        return with_context(prompt, context)

    def _without_end(self, message: dict[str, Any]) -> dict[str, Any]:
        text = message.get("content")
        if message["role"] != "assistant" or not text or not text.rstrip().endswith(self.ends):
            return message
        end = next(end for end in self.ends if text.rstrip().endswith(end))
        return self._without_end(message | {"content": text.rstrip().removesuffix(end)})


def refuse_unread_kwargs(kwargs: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """ConfigError for a name in `data.chat_template_kwargs` that no chat template reads, or where none is applied."""
    if kwargs and isinstance(rows[0]["prompt"], str):
        raise ConfigError("data.chat_template_kwargs has no effect: the rows are text, to which no template is applied")
    template = str(tokenizer.chat_template)
    for name in kwargs:
        if name in TAKEN:
            raise ConfigError(f"data.chat_template_kwargs has {name}, which is no variable of a template: leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            near = did_you_mean(name, re.findall(r"\b[a-z]\w*\b", template))
            raise ConfigError(f"data.chat_template_kwargs: the chat template reads no {name}{near}")
