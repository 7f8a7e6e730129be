"""All sources of a config as normal rows of one kind and one form, with every row that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.data.control import count_in_rows, try_template
from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.data.rows import Kind, as_chat, normalise
from dpo_kit.errors import DataError
from dpo_kit.settings import Data, Source

Rows = list[dict[str, Any]]


@dataclass
class Gathered:
    """Well-formed rows as they stand in their sources, each with its `_place` and its own `_values` apart from what is
    added to it; `read` counts the malformed ones too.
    """

    kind: Kind
    train: list[Rows]  # one list for each source
    held_out: Rows | None  # of data.eval; None where held-out prompts are to be taken from train
    faults: list[Fault]
    read: int
    wrap: bool  # text rows are to become a user turn and an assistant turn
    control_tokens: dict[str, Any] = field(default_factory=dict)  # in the text of rows: see control.py

    def form(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` as it is trained on."""
        return as_chat(row, self.kind) if self.wrap else row


def gather(data: Data, tokenizer: Any, *, refuse: bool = True, bare: bool = False) -> Gathered:
    """Read everything. Malformed rows are refused as `data.on_bad_row` says, or only listed; rows of a prompt alone are
    taken where they may be `bare`. Raises DataError.
    """
    wrap = tokenizer.chat_template is not None if data.wrap_as_chat == "auto" else data.wrap_as_chat
    reader = _Reader(data, tokenizer, wrap, bare)
    train = [reader.read(source.path, data.train_split) for source in sources(data.train)]
    held_out = [reader.read(source.path, data.eval_split or data.train_split) for source in eval_sources(data)]
    if refuse and data.on_bad_row == "fail":
        refuse_malformed(reader.faults)
    for path, kind, _ in (*train, *held_out):
        if kind != train[0][1]:
            raise DataError(
                f"{train[0][1]} and {kind} rows cannot be mixed, as {train[0][0]} and {path} do: "
                "convert one of them with python -m dpo_kit.data mode=convert"
            )
    reader.refuse_mixture()
    pool = [row for _, _, rows in held_out for row in rows] if held_out else None
    gathered = Gathered(train[0][1], [rows for _, _, rows in train], pool, reader.faults, reader.count, wrap)
    formed = [gathered.form(row) for rows in (*gathered.train, pool or []) for row in rows]
    try_template(formed, gathered.kind, tokenizer)
    gathered.control_tokens = count_in_rows(formed, gathered.kind, tokenizer)
    return gathered


def sources(spec: str | list[Source]) -> list[Source]:
    return [Source(path=spec)] if isinstance(spec, str) else spec


def eval_sources(data: Data) -> list[Source]:
    if data.eval is not None:
        return sources(data.eval)
    return sources(data.train) if data.eval_split else []


def refuse_malformed(faults: list[Fault]) -> None:
    """DataError with the first of `faults`, where there are any."""
    if faults:
        first = "\n".join(f"  {fault}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{len(faults)} malformed rows:\n{first}{more}\nmend them, or leave them out with data.on_bad_row=drop"
        )


class _Reader:
    """Reads one source after the other and keeps what is wrong."""

    def __init__(self, data: Data, tokenizer: Any, wrap: bool, bare: bool) -> None:
        self.data, self.wrap, self.bare = data, wrap, bare
        self.has_template = tokenizer.chat_template is not None
        self.faults: list[Fault] = []
        self.count = 0
        self.forms: dict[bool, str] = {}  # is it text: the first such row

    def read(self, path: str, split: str) -> tuple[str, Kind, Rows]:
        since = len(self.faults)
        found = list(read_source(path, split))
        self.count += len(found)
        rows = self._keep(found)
        self._refuse_empty(path, rows, since)
        kind = find_kind(path, rows, self.data.columns, bare=self.bare)
        rows = self._keep(normalise(row, kind, self.data.columns) for row in rows)
        for row in rows:
            self.forms.setdefault(isinstance(row.values["prompt"], str), row.place)
        self._refuse_empty(path, rows, since)
        return path, kind, [row.values | {"_place": row.place, "_values": row.values} for row in rows]

    def _refuse_empty(self, path: str, rows: list[Row], since: int) -> None:
        if not rows:
            first = f": {self.faults[since]}" if len(self.faults) > since else ""
            raise DataError(f"{path} has no row to train on{first or ': name a file with rows'}")

    def _keep(self, items: Iterable[Row | Fault]) -> list[Row]:
        rows = []
        for item in items:
            if isinstance(item, Row):
                rows.append(item)
            else:
                self.faults.append(item)
        return rows

    def refuse_mixture(self) -> None:
        """Text rows and chat rows side by side are taken all for what the first one is by TRL."""
        if len(self.forms) > 1 and self.data.wrap_as_chat is not True:
            raise DataError(
                f"text rows (such as {self.forms[True]}) and chat rows ({self.forms[False]}) are mixed: "
                "data.wrap_as_chat=true makes chat of both"
            )
        if False in self.forms and not self.has_template:
            raise DataError(
                f"{self.forms[False]} has chat messages, but the tokenizer has no chat template: use an instruct "
                "model, or name a template with model.chat_template=FILE"
            )


def find_kind(path: str, rows: list[Row], columns: dict[str, str], *, bare: bool = False) -> Kind:
    """Pairs or unary rows, or prompts alone where rows may be `bare`, by the columns that any row has.

    Raises DataError that says which columns to map.
    """
    names = {name for row in rows for name in row.values}
    for mine, theirs in columns.items():
        if theirs not in names:
            near = difflib.get_close_matches(theirs, names, n=1) or sorted(names)
            raise DataError(f"{path} has no column {theirs!r} (data.columns.{mine}); it has {', '.join(near)}")
    ours = names | {mine for mine, theirs in columns.items() if theirs in names}
    if {"chosen", "rejected"} <= ours:
        return "pairs"
    if {"prompt", "completion", "label"} <= ours:
        return "unary"
    if bare and "prompt" in ours:
        return "prompts"
    wanted = ("prompt", "chosen", "rejected", "completion", "label")
    hints = {w: difflib.get_close_matches(w, names - set(wanted), n=1) for w in wanted if w not in ours}
    hint = ", ".join(f"{w}: {near[0]}" for w, near in hints.items() if near)
    raise DataError(
        f"{path} has the columns {', '.join(sorted(names))}; needed are prompt, chosen, rejected (pairs) or prompt, "
        f"completion, label (unary): map them with data.columns={{{hint or 'chosen: …, rejected: …'}}}, or bring "
        "another schema into this form with python -m dpo_kit.data mode=convert"
    )
