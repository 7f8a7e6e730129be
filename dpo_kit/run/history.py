"""metrics.jsonl: one JSON object per log event, the record that all else is drawn from. Strict JSON, readable by any
parser: a value that is not finite is written as null and named under `non_finite`
({"loss": null, "non_finite": {"loss": "nan"}}); `read_metrics` gives the float back.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_kit.errors import DataError

log = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """`value` as bool, int, float, str or None: NumPy and torch scalars become numbers, anything else its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return str(value)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to `path`, in the hands of the system when this returns (a killed process loses no line)."""
    values = {key: plain(value) for key, value in row.items()}
    strange = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    if strange:
        values |= dict.fromkeys(strange) | {"non_finite": strange}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")


def decode_row(line: str) -> dict[str, Any]:
    """The row that `append_row` was given, with its non-finite values as floats again."""
    row = json.loads(line)
    return row | {key: float(text) for key, text in row.pop("non_finite", {}).items()}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; [] without it. A last line that a kill cut is left out. DataError: not JSON."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(decode_row(line))
        except (json.JSONDecodeError, AttributeError) as error:
            if number < len(lines):
                raise DataError(f"{path}:{number} is not JSON ({error}); delete that line to go on") from error
            log.info("%s: the last line was cut short and is left out", path)
    return rows


def series(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """{step: value} of the finite values of `key`, in the order of steps; the last one counts where a step has two."""
    values = {row.get("step", 0): row[key] for row in rows if isinstance(row.get(key), int | float)}
    return {step: values[step] for step in sorted(values) if math.isfinite(values[step])}


def latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{key: the last finite number under it}: what is known at the end of `rows`."""
    numbers = ((key, value) for row in rows for key, value in row.items() if isinstance(value, int | float))
    return {key: value for key, value in numbers if math.isfinite(value)}


def last_step(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of the latest step among `rows` (of a probe.jsonl, of a samples.jsonl)."""
    latest_step = max((row.get("step", 0) for row in rows), default=0)
    return [row for row in rows if row.get("step", 0) == latest_step]
