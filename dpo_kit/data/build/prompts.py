"""Prompts to build pairs from: a column of a file, each prompt once, every row accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_kit.config.settings import Data
from dpo_kit.data.context import context_fault, read_context
from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.data.rows import question_fault, text_fault
from dpo_kit.data.shape import Shape
from dpo_kit.errors import DataError
from dpo_kit.model.chats import as_messages
from dpo_kit.run.files import digest


@dataclass(frozen=True)
class Prompts:
    """Different prompts in the order of the file, and what became of its other rows, by reason."""

    prompts: list[Any]
    left_out: dict[str, int]


def read_prompts(path: str | None, data: Data, limit: int | None) -> Prompts:
    """The prompts of `path`, or of `data.train` where it is None; at most `limit` of them.

    Malformed rows obey `data.on_bad_row`. Raises DataError.
    """
    faults: list[Fault] = []
    found: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    for prompt in _read(path, data, faults):
        key = digest(prompt)
        if key in found:
            left_out["repeated"] += 1
        elif limit is not None and len(found) >= limit:
            left_out["beyond build.limit"] += 1
        else:
            found[key] = prompt
    if faults and data.on_bad_row == "fail":
        first = faults[0]
        raise DataError(
            f"{len(faults)} malformed prompts; the first at {first.place}: {first.reason} ({first.found}); mend them, "
            "or leave them out with data.on_bad_row=drop"
        )
    left_out.update(fault.reason for fault in faults)
    if not found:
        raise DataError(
            f"{path or data.train} has no prompt to build pairs from: a row needs text or messages under the "
            "column prompt"
        )
    return Prompts(list(found.values()), dict(left_out))


def _read(path: str | None, data: Data, faults: list[Fault]) -> Iterator[Any]:
    sources = data.train if isinstance(data.train, list) else None
    paths = [path] if path else [each.path for each in sources] if sources is not None else [str(data.train)]
    column = data.columns.get("prompt", "prompt")
    shape = Shape(wrap=False, fold_system=data.fold_system, template_kwargs=data.chat_template_kwargs)
    for row in (row for each in paths for row in read_source(each, data.train_split)):
        fault = row if isinstance(row, Fault) else _fault(row, column)
        if fault:
            faults.append(fault)
        elif isinstance(row, Row):
            yield _asked(row.values | {"prompt": row.values[column]}, shape)


def _asked(values: dict[str, Any], shape: Shape) -> Any:
    """The prompt of a row: text as it stands where no column adds to it, else a chat."""
    adds = values.get("system") or read_context(values) or shape.template_kwargs
    prompt = as_messages(values["prompt"]) if adds else values["prompt"]
    return prompt if isinstance(prompt, str) else shape.prompt(prompt, values)


def _fault(row: Row, column: str) -> Fault | None:
    value = row.values.get(column)
    if column not in row.values:
        return Fault(row.place, f"no column {column!r}", f"columns {', '.join(row.values)}; name it: data.columns=…")
    fault = text_fault("prompt", value) or question_fault(value) or context_fault(row.values | {"prompt": value})
    return Fault(row.place, *fault) if fault else None
