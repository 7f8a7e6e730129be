"""All sources of a config as normal rows of one kind and one form, with every row that is not."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_kit.data.control import (
    count_in_rows,
    describe_changes,
    describe_columns,
    describe_end,
    is_rendered,
    try_template,
)
from dpo_kit.data.ids import add_ids
from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.data.rows import Kind, normalise
from dpo_kit.data.shape import Shape, refuse_unread_kwargs
from dpo_kit.errors import DataError
from dpo_kit.settings import Data, Source
from dpo_kit.turns import end_tokens

Rows = list[dict[str, Any]]


@dataclass
class Gathered:
    """Well-formed rows as they stand in their sources, each with its `_place`, its own `_values` apart from what is
    added to it, and the `ids` (of prompt and answers) that it is trained on; `read` counts the malformed ones too.
    """

    kind: Kind
    train: list[Rows]  # one list for each source
    held_out: Rows | None  # of data.eval; None where held-out prompts are to be taken from train
    faults: list[Fault]
    read: int
    shape: Shape
    said: dict[str, Any] = field(default_factory=dict)  # for the report: control tokens, unused columns; see control.py

    def form(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` as it is trained on."""
        return self.shape.of(row, self.kind)


def gather(data: Data, tokenizer: Any, *, refuse: bool = True, bare: bool = False) -> Gathered:
    """Read everything. Malformed rows are refused as `data.on_bad_row` says, or only listed; rows of a prompt alone are
    taken where they may be `bare`. Raises DataError.
    """
    reader = _Reader(data, tokenizer, bare)
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
    every = [row for _, _, rows in (*train, *held_out) for row in rows]
    shape = Shape(_wraps(data, tokenizer, every), data.fold_system, data.chat_template_kwargs)
    gathered = Gathered(train[0][1], [rows for _, _, rows in train], pool, reader.faults, reader.count, shape)
    _read_ids(gathered, every, tokenizer)
    if refuse and data.on_bad_row == "fail":
        refuse_malformed(reader.faults)
    if not any(gathered.train):
        raise DataError(f"{train[0][0]} has no row to train on: {count_faults(reader.faults)}")
    return gathered


def _wraps(data: Data, tokenizer: Any, rows: Rows) -> bool:
    """Whether text rows become chats: where there is a template, unless they are rendered by one already."""
    if data.wrap_as_chat != "auto":
        return data.wrap_as_chat
    return tokenizer.chat_template is not None and not is_rendered(rows, tokenizer)


def _read_ids(gathered: Gathered, rows: Rows, tokenizer: Any) -> None:
    """Give all rows their ids and the report what it says of them; rows that have none are taken out as faults."""
    formed = [gathered.form(row) for row in rows]
    refuse_unread_kwargs(gathered.shape.template_kwargs, formed, tokenizer)
    try_template(formed, gathered.kind, tokenizer)
    if not isinstance(formed[0]["prompt"], str):  # only now is the template rendered here
        gathered.shape = replace(gathered.shape, ends=end_tokens(tokenizer))
        with_ends, formed = formed, [gathered.form(row) for row in rows]
        plain = replace(gathered.shape, fold_system=False)
        unfolded = (plain.of(row, gathered.kind) for row in rows) if gathered.shape.fold_system else formed
        gathered.said = describe_end(tokenizer) | describe_changes(formed, with_ends, unfolded)
    gathered.said |= describe_columns(rows, formed, gathered.kind)
    gathered.said["control_tokens"] = count_in_rows(formed, gathered.kind, tokenizer)
    add_ids(rows, formed, gathered.kind, tokenizer, gathered.faults)
    gathered.train = [[row for row in part if "ids" in row] for part in gathered.train]
    if gathered.held_out is not None:
        gathered.held_out = [row for row in gathered.held_out if "ids" in row]


def sources(spec: str | list[Source]) -> list[Source]:
    return [Source(path=spec)] if isinstance(spec, str) else spec


def eval_sources(data: Data) -> list[Source]:
    if data.eval is not None:
        return sources(data.eval)
    return sources(data.train) if data.eval_split else []


def count_faults(faults: Sequence[Fault]) -> str:
    """The reasons of `faults` with their numbers, and the first of them in full."""
    if not faults:
        return "name a file with rows"
    reasons = Counter(fault.reason for fault in faults).most_common()
    return ", ".join(f"{count} × {reason}" for reason, count in reasons) + f"; the first is {faults[0]}"


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

    def __init__(self, data: Data, tokenizer: Any, bare: bool) -> None:
        self.data, self.bare = data, bare
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
            raise DataError(f"{path} has no row to train on: {count_faults(self.faults[since:])}")

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
