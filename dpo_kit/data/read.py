"""Rows from files, folders and the hub, one plain dict each, with the place they came from.

A row that cannot be read is not raised but handed on as a `Fault`: what happens to it is decided in one place
(`data.on_bad_row`).
"""

from __future__ import annotations

import difflib
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.errors import DataError

LINES, WHOLE, TABLES = (".jsonl", ".jsonl.gz", ".ndjson"), (".json",), (".parquet",)


@dataclass(frozen=True)
class Row:
    """One row and its place: `file:line`, `file row n` or `data set[split] row n`."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One row that cannot be used: where, why (a countable reason), and what was found."""

    place: str
    reason: str
    found: str


def read_source(path: str, split: str) -> Iterator[Row | Fault]:
    """All rows of a local file or folder, or of a hub data set's split. Raises DataError where there is nothing."""
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.name.endswith(LINES + WHOLE + TABLES))
        if not files:
            raise DataError(f"{path} has no {', '.join(LINES + WHOLE + TABLES)} file in it")
        for file in files:
            yield from _read_file(file)
    elif local.exists():
        yield from _read_file(local)
    elif local.suffix or path.startswith((".", "/", "~")):
        raise DataError(_not_found(local))
    else:
        yield from _read_hub(path, split)


def _not_found(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=2)
    return f"no such file or folder: {path}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def _read_file(path: Path) -> Iterator[Row | Fault]:
    if path.name.endswith(LINES):
        return _read_lines(path)
    if path.name.endswith(WHOLE):
        return _read_whole(path)
    if path.name.endswith(TABLES):
        return _read_table(path)
    raise DataError(f"{path}: unknown kind of file; known are {', '.join(LINES + WHOLE + TABLES)}")


def _read_lines(path: Path) -> Iterator[Row | Fault]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield _parse(f"{path}:{number}", text)


def _parse(place: str, line: bytes) -> Row | Fault:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return Fault(place, "not UTF-8", f"byte {error.start}")
    except json.JSONDecodeError as error:
        return Fault(place, "not JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Fault(place, "not JSON", str(error))
    return _as_row(place, value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"key {twice[0]!r} stands twice")
    return dict(pairs)


def _as_row(place: str, value: Any) -> Row | Fault:
    return Row(place, value) if isinstance(value, dict) else Fault(place, "not an object", type(value).__name__)


def _read_whole(path: Path) -> Iterator[Row | Fault]:
    parsed = _parse(str(path), b'{"rows": ' + path.read_bytes().removeprefix(b"\xef\xbb\xbf") + b"}")
    if isinstance(parsed, Fault) or not isinstance(parsed.values["rows"], list):
        found = parsed.found if isinstance(parsed, Fault) else "an object"
        raise DataError(f"{path} must hold one JSON list of rows, found: {found}; one row a line is a .jsonl file")
    for number, value in enumerate(parsed.values["rows"]):
        yield _as_row(f"{path} row {number}", value)


def _read_table(path: Path) -> Iterator[Row | Fault]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    for number, values in enumerate(rows):
        yield Row(f"{path} row {number}", values)


def _read_hub(name: str, split: str) -> Iterator[Row | Fault]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the libraries below raise many kinds; all mean that there is nothing to read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name!r} is neither a local file or folder nor a hub data set that can be reached "
            f"(split {split!r}): {reason}"
        ) from error
    for number, values in enumerate(rows):
        yield Row(f"{name}[{split}] row {number}", values)
