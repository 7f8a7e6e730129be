"""A row as it is trained on: text or chat with the columns that belong to its prompt; its token ids, read once."""

import re
from array import array
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.data.read import Fault
from dpo_kit.data.rows import ANSWERS, BESIDE, TAKEN, Kind, Rows, read_context
from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.model.chats import Messages, as_messages, split_context, with_context
from dpo_kit.run.files import digest
from dpo_kit.run.quiet import bar

CHUNK = 1000  # rows that are rendered at once
FOLD = "data.fold_system=true puts the system turn at the beginning of the first user turn"


@dataclass(frozen=True)
class Shape:
    """How rows become what is trained on. `ends`, which the template writes, are cut off answers that have them."""

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
        text = whole = message.get("content")
        while message["role"] == "assistant" and text and text.rstrip().endswith(self.ends):
            text = text.rstrip()
            text = text.removesuffix(next(end for end in self.ends if text.endswith(end)))
        return message if text is whole else message | {"content": text}


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


def add_ids(rows: Rows, formed: Rows, kind: Kind, tokenizer: Any, faults: list[Fault]) -> None:
    """Give each row `ids`, of its prompt and of each answer, before truncation, and `prompt_id`, equal exactly when the
    prompt is (and an order of prompts at random that is the same on every machine).

    `formed` are the rows as they are trained on. One that the chat template refuses, or leaves a part of out (so that
    nobody would be trained on what it says), gets neither and is added to `faults`.
    """
    from dpo_kit.model.turns import PARTS, leaves_out

    both = list(zip(rows, formed, strict=True))
    with bar(len(rows), "tokenizing", "row") as progress:
        for start in range(0, len(rows), CHUNK):
            whole = []
            for row, shaped in both[start : start + CHUNK]:
                is_text = isinstance(shaped["prompt"], str)
                chat = [] if is_text else [turn for name in ("prompt", *ANSWERS[kind]) for turn in shaped[name]]
                parts = (part for part in PARTS if any(turn.get(part) or turn["role"] == part for turn in chat))
                if part := next((part for part in parts if leaves_out(tokenizer, part)), None):
                    remedy = "take a template that writes it (model.chat_template=FILE), or take it out of the row"
                    remedy = f"{FOLD}; or {remedy}" if part == "system" else remedy
                    faults.append(Fault(row["_place"], f"the chat template leaves out {part}", "in silence", remedy))
                else:
                    whole.append((row, shaped))
            _encode(whole, kind, tokenizer, faults)
            progress.update(min(CHUNK, len(rows) - start))


def _encode(part: list[tuple[dict[str, Any], dict[str, Any]]], kind: Kind, tokenizer: Any, faults: list[Fault]) -> None:
    """Ids of rows, each with itself as it is trained on."""
    from dpo_kit.model.tokens import encode_rows

    answers = [[shaped[name] for name in ANSWERS[kind]] for _, shaped in part]
    try:
        encoded = encode_rows(tokenizer, [shaped["prompt"] for _, shaped in part], answers)
    except Exception as error:  # a template is somebody's program and may raise anything: which row is it?
        if len(part) > 1:
            for pair in part:
                _encode([pair], kind, tokenizer, faults)
            return
        row, shaped = part[0]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        remedy = "mend its turns, or take another template with model.chat_template=FILE"
        remedy = f"{FOLD}; or {remedy}" if shaped["prompt"][0]["role"] == "system" else remedy
        faults.append(Fault(row["_place"], "the chat template refuses this chat", reason, remedy))
        return
    for (row, shaped), (prompt, completions) in zip(part, encoded, strict=True):
        row["prompt_id"] = digest(shaped["prompt"])
        names = ("prompt", *ANSWERS[kind])
        row["ids"] = {name: array("i", ids) for name, ids in zip(names, (prompt, *completions), strict=True)}
