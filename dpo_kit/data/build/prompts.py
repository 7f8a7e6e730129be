"""Prompts to build pairs from: a column of a file, each prompt once, every row accounted for."""

from collections import Counter
from typing import Any

from dpo_kit.config.settings import Data
from dpo_kit.data.gather import refuse_malformed, sources
from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.data.rows import normalise, read_context
from dpo_kit.data.shape import Shape
from dpo_kit.errors import DataError
from dpo_kit.model.chats import as_messages
from dpo_kit.run.files import digest


def read_prompts(path: str | None, data: Data, limit: int | None) -> tuple[list[Any], dict[str, int]]:
    """The different prompts of `path` or `data.train` in their order, at most `limit`, and how many other rows there
    are, by reason; malformed ones obey `data.on_bad_row`. Raises DataError.
    """
    column = data.columns.get("prompt", "prompt")
    shape = Shape(wrap=False, fold_system=data.fold_system, template_kwargs=data.chat_template_kwargs)
    faults: list[Fault] = []
    prompts: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    for row in (row for source in sources(path or data.train) for row in read_source(source.path, data.train_split)):
        if isinstance(row, Row):
            renamed = {"prompt": row.values[column]} if column in row.values else {}
            row = normalise(Row(row.place, row.values | renamed), "prompts")
        if isinstance(row, Fault):
            faults.append(row)
            continue
        values, prompt = row.values, row.values["prompt"]
        if not isinstance(prompt, str) or values.get("system") or read_context(values) or shape.template_kwargs:
            prompt = shape.prompt(as_messages(prompt), values)  # text stays where nothing is added
        key = digest(prompt)
        if key in prompts:
            left_out["repeated"] += 1
        elif limit is not None and len(prompts) >= limit:
            left_out["beyond build.limit"] += 1
        else:
            prompts[key] = prompt
    if data.on_bad_row == "fail":
        refuse_malformed(faults)
    left_out.update(fault.reason for fault in faults)
    if not prompts:
        needed = "a row needs text or messages under the column prompt"
        raise DataError(f"{path or data.train} has no prompt to build pairs from: {needed}")
    return list(prompts.values()), dict(left_out)
