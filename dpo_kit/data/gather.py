"""All sources of a config as normal rows of one kind and one form, with every row that is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_kit.config.settings import Data, Source
from dpo_kit.data.control import count_in_rows, describe_changes, describe_columns, describe_end, try_template
from dpo_kit.data.forms import Match, recognise
from dpo_kit.data.ids import add_ids
from dpo_kit.data.read import Fault, Row, Tie, read_source
from dpo_kit.data.rows import Kind, Rows
from dpo_kit.data.shape import Shape, refuse_unread_kwargs
from dpo_kit.errors import DataError

KINDS: dict[str, Kind] = {"pairs": "pairs", "scored": "pairs", "unary": "unary", "prompts": "prompts"}


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
    forms: dict[str, str]  # by source: what its rows were read as
    notes: dict[str, Any] = field(default_factory=dict)  # for the report, from control.py

    def shaped(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` as it is trained on."""
        return self.shape.of(row, self.kind)


def gather(data: Data, tokenizer: Any, *, refuse: bool = True, bare: bool = False) -> Gathered:
    """Read everything. Malformed rows are refused as `data.on_bad_row` says, or only listed; rows of a prompt alone are
    taken where they may be `bare`. Raises DataError.
    """
    refuse = refuse and data.on_bad_row == "fail"
    faults: list[Fault] = []
    forms: dict[str, str] = {}
    parts: list[tuple[str, Kind, Rows]] = []
    read = 0
    trained = [(source, data.train_split) for source in sources(data.train)]
    for source, split in [*trained, *((s, data.eval_split or data.train_split) for s in eval_sources(data))]:
        path, since = source.path, len(faults)
        match, rows = read_rows(source, split, data, faults, bare=bare)
        read += len(rows) + len(faults) - since
        forms[path] = str(match)
        if match.form.rows == "rated":
            raise DataError(
                f"{path} has one scored answer a row ({match}): python -m dpo_kit data mode=convert "
                f"data=jsonl data.train={path} makes pairs of those to one prompt"
            )
        if match.form.rows == "scored":
            from dpo_kit.data.other_forms import best_and_worst

            rows = _keep(map(best_and_worst, rows), faults)
        _refuse_empty(path, rows, faults[since:])
        placed = [row.values | {"_place": row.place, "_values": row.values} for row in rows]
        parts.append((path, KINDS[match.form.rows], placed))
    if refuse:
        refuse_malformed(faults)
    first, kind, _ = parts[0]
    for path, other, _ in parts:
        if other != kind:
            raise DataError(
                f"{kind} and {other} rows cannot be mixed, as {first} and {path} do: "
                "convert one of them with python -m dpo_kit data mode=convert"
            )
    train, held_out = ([rows for _, _, rows in some] for some in (parts[: len(trained)], parts[len(trained) :]))
    every = [row for rows in (*train, *held_out) for row in rows]
    _refuse_mixture(every, data, tokenizer)
    wrap = tokenizer.chat_template is not None if data.wrap_as_chat == "auto" else data.wrap_as_chat
    if wrap and data.wrap_as_chat == "auto":  # text becomes chat, unless all of it is rendered by a template already
        from dpo_kit.model.turns import control_pattern

        begins = control_pattern(tokenizer).match
        wrap = not all(isinstance(row["prompt"], str) and begins(row["prompt"].lstrip()) for row in every)
    shape = Shape(wrap, data.fold_system, data.chat_template_kwargs)
    pool = [row for rows in held_out for row in rows] if held_out else None
    gathered = Gathered(kind, train, pool, faults, read, shape, forms)
    _read_ids(gathered, every, tokenizer)
    if refuse:
        refuse_malformed(faults)
    if not any(gathered.train):
        raise DataError(f"{first} has no row to train on: {count_faults(faults)}")
    return gathered


def _refuse_mixture(rows: Rows, data: Data, tokenizer: Any) -> None:
    """Text rows and chat rows side by side are taken all for what the first one is by TRL."""
    text, chat = (
        next((row["_place"] for row in rows if isinstance(row["prompt"], str) == is_text), None)
        for is_text in (True, False)
    )
    if text and chat and data.wrap_as_chat is not True:
        raise DataError(
            f"text rows (such as {text}) and chat rows ({chat}) are mixed: data.wrap_as_chat=true makes chat of both"
        )
    if chat and tokenizer.chat_template is None:
        raise DataError(
            f"{chat} has chat messages, but the tokenizer has no chat template: use an instruct "
            "model, or name a template with model.chat_template=FILE"
        )


def _read_ids(gathered: Gathered, rows: Rows, tokenizer: Any) -> None:
    """Give all rows their ids and the report what it says of them; rows that have none are taken out as faults."""
    formed = [gathered.shaped(row) for row in rows]
    refuse_unread_kwargs(gathered.shape.template_kwargs, formed, tokenizer)
    try_template(formed, gathered.kind, tokenizer)
    if not isinstance(formed[0]["prompt"], str):  # only now is the template rendered here
        from dpo_kit.model.turns import end_tokens

        gathered.shape = replace(gathered.shape, ends=end_tokens(tokenizer))
        with_ends, formed = formed, [gathered.shaped(row) for row in rows]
        plain = replace(gathered.shape, fold_system=False)
        unfolded = (plain.of(row, gathered.kind) for row in rows) if gathered.shape.fold_system else formed
        gathered.notes = describe_end(tokenizer) | describe_changes(formed, with_ends, unfolded)
    gathered.notes |= describe_columns(rows, formed, gathered.kind)
    gathered.notes["control_tokens"] = count_in_rows(formed, gathered.kind, tokenizer)
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
    """DataError with the first of `faults` that is more than a tie, where there are any."""
    if faults := [fault for fault in faults if not isinstance(fault, Tie)]:
        first = "\n".join(f"  {fault}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{len(faults)} malformed rows:\n{first}{more}\nmend them, or leave them out with data.on_bad_row=drop"
        )


def read_rows(
    source: Source, split: str, data: Data, faults: list[Fault], *, bare: bool = False
) -> tuple[Match, list[Row]]:
    """The form of a source and its rows in it; what cannot be read is added to `faults`. Raises DataError."""
    since = len(faults)
    rows = _keep(read_source(source.path, split, source.config or data.config), faults)
    _refuse_empty(source.path, rows, faults[since:])
    match = recognise(source.path, rows, data.columns, source.form or data.form, bare=bare)
    return match, _keep(map(match.read, rows), faults)


def _keep(items: Iterable[Row | Fault], faults: list[Fault]) -> list[Row]:
    rows = []
    for item in items:
        if isinstance(item, Row):
            rows.append(item)
        else:
            faults.append(item)
    return rows


def _refuse_empty(path: str, rows: list[Row], faults: list[Fault]) -> None:
    if not rows:
        raise DataError(f"{path} has no row to train on: {count_faults(faults)}")
