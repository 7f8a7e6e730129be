"""Rows from files, folders and the hub, one plain dict each, with the place they came from.

A row that cannot be read is not raised but handed on as a `Fault`: what happens to it is decided in one place
(`data.on_bad_row`). Where an unknown number of rows is lost with it (a cut archive, a quote never closed), the file is
refused. Files are read as a stream, except .json, whose text must be in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.errors import DataError, did_you_mean

LINES, WHOLE, TABLES, CELLS = (".jsonl", ".jsonl.gz", ".ndjson"), (".json",), (".parquet",), (".csv",)
KNOWN = LINES + WHOLE + TABLES + CELLS
BOM = b"\xef\xbb\xbf"
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Row:
    """One row and its place: `file:line`, `file row n` or `data set[split] row n`."""

    place: str
    values: dict[str, Any]
    typed: bool = True  # False: every value is the text that stood in the file


@dataclass(frozen=True)
class Fault:
    """One row that cannot be used: where, why (a countable reason, with its column), what was found, what to do."""

    place: str
    reason: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason} ({self.found})" + (f": {self.remedy}" if self.remedy else "")


def read_source(path: str, split: str) -> Iterator[Row | Fault]:
    """All rows of a local file or folder, or of a hub data set's split. Raises DataError where there is nothing."""
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.name.endswith(KNOWN))
        if not files:
            raise DataError(f"{path} has no {', '.join(KNOWN)} file in it")
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
    return f"no such file or folder: {path}{did_you_mean(path.name, siblings, count=2)}"


def _read_file(path: Path) -> Iterator[Row | Fault]:
    readers = {LINES: _read_lines, WHOLE: _read_whole, TABLES: _read_table, CELLS: _read_cells}
    reader = next((reader for endings, reader in readers.items() if path.name.endswith(endings)), None)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; known are {', '.join(KNOWN)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


# --- JSON --------------------------------------------------------------------------------------------------------


class _Json:
    """Strict JSON: what is amiss inside a value is noted, not raised, so that reading goes on behind it."""

    def __init__(self) -> None:
        self._amiss: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = {sys.intern(key): value for key, value in pairs}
        if len(made) < len(pairs):
            self._amiss.append(f"key {_twice(key for key, _ in pairs)!r} stands twice")
        return made

    def _constant(self, name: str) -> None:
        self._amiss.append(f"{name} is no JSON: write null")

    def row(self, place: str, text: str, start: int = 0) -> tuple[Row | Fault, int]:
        """The value at `start` as a row, and where it ends. Raises JSONDecodeError, ValueError or RecursionError."""
        self._amiss.clear()
        value, end = self._decoder.raw_decode(text, start)
        if self._amiss:
            return Fault(place, "not strict JSON", self._amiss[0], "mend the row"), end
        if not isinstance(value, dict):
            return Fault(place, "not an object", type(value).__name__, 'a row is {"prompt": …, …}'), end
        if _HALF_CHARACTER.search(text, start, end) and (found := _lone_surrogate(value)):
            return Fault(place, "half a character", found, "write the text anew as UTF-8"), end
        return Row(place, value), end


def _twice(names: Any) -> str:
    return Counter(names).most_common(1)[0][0]


def _lone_surrogate(value: Any) -> str | None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):x} without its other half"
    return None


def _read_lines(path: Path) -> Iterator[Row | Fault]:
    parser = _Json()
    for number, line in _lines(path):
        bare = line.removeprefix(BOM).strip() if number == 1 else line.strip()
        if bare:
            yield _parse_line(parser, f"{path}:{number}", bare)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{number + 1}: the compressed file is cut or damaged here ({error}), and how many rows are lost "
            "cannot be told: copy it again"
        ) from error


def _parse_line(parser: _Json, place: str, line: bytes) -> Row | Fault:
    try:
        text = line.decode("utf-8")
        row, end = parser.row(place, text)
    except UnicodeDecodeError as error:
        return Fault(place, "not UTF-8", f"byte {error.start} is {line[error.start]:#x}", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated")
        remedy = "the line is cut: copy the file again, or remove it" if cut else "mend the line"
        return Fault(place, "not JSON", f"{error.msg} at column {error.colno}", remedy)
    except (ValueError, RecursionError) as error:
        return Fault(place, "not JSON", str(error), "mend the line")
    if end < len(text):
        return Fault(place, "not JSON", f"Extra data at column {end + 1}", "one object a line")
    return row


def _read_whole(path: Path) -> Iterator[Row | Fault]:
    """The rows of one JSON list, decoded one by one, so that a fault inside a row does not cost the others."""
    try:
        text = path.read_bytes().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    parser, number, position = _Json(), 0, _skip(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path} must hold one JSON list of rows; one row a line is a .jsonl file")
    position, more = _skip(text, position + 1), True
    if text[position : position + 1] == "]":
        return
    while more:
        row, position = _element(parser, path, number, text, position)
        yield row
        position, more = _after_element(path, text, position)
        number += 1
    if position < len(text):
        raise _broken(path, text, position, "text after the list")


def _element(parser: _Json, path: Path, number: int, text: str, position: int) -> tuple[Row | Fault, int]:
    try:
        return parser.row(f"{path} row {number}", text, position)
    except json.JSONDecodeError as error:
        raise _broken(path, text, error.pos, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, text, position, str(error)) from error


def _after_element(path: Path, text: str, position: int) -> tuple[int, bool]:
    """Where to go on behind a row, and whether another one follows."""
    position = _skip(text, position)
    sign = text[position : position + 1]
    if sign not in (",", "]") or not sign:
        raise _broken(path, text, position, "expecting ',' or ']'")
    return _skip(text, position + 1), sign == ","


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _broken(path: Path, text: str, position: int, why: str) -> DataError:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    cut = " (the file is cut)" if position >= len(text) else ""
    return DataError(f"{path}:{line}: not JSON: {why} at column {column}{cut}: mend or copy the file again")


# --- CSV, Parquet, hub -------------------------------------------------------------------------------------------


def _read_cells(path: Path) -> Iterator[Row | Fault]:
    """CSV with a header; every cell stays the text that it is."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = csv.reader(file, strict=True)
        names = _header(path, records)
        while True:
            place = f"{path}:{records.line_num + 1}"
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):
                    raise DataError(
                        f"{place}: a quote that opens here is never closed: double it, or close it"
                    ) from error
                yield Fault(
                    place, "not CSV", f"{error}, up to line {records.line_num}", "quote the cell, double its quotes"
                )
                continue
            if cells:
                yield _cells_row(place, names, cells)


def _header(path: Path, records: Any) -> list[str]:
    names: list[str]
    try:
        names = next(records, [])
    except csv.Error as error:
        raise DataError(f"{path}:1: the header is not CSV: {error}; save the file as CSV in UTF-8") from error
    if not any(names):
        raise DataError(f"{path}:1: a CSV file needs a header line with the names of its columns")
    if len(set(names)) < len(names):
        raise DataError(f"{path}:1: the column {_twice(names)!r} stands twice: rename one")
    return names


def _cells_row(place: str, names: list[str], cells: list[str]) -> Row | Fault:
    if len(cells) != len(names):
        return Fault(place, "wrong number of cells", f"{len(cells)}, the header has {len(names)}", "quote commas")
    broken = next((name for name, cell in zip(names, cells, strict=True) if not _is_utf8(cell)), None)
    if broken is not None:
        return Fault(place, "not UTF-8", f"in column {broken!r}", "save the file as UTF-8")
    return Row(place, dict(zip(names, cells, strict=True)), typed=False)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_table(path: Path) -> Iterator[Row | Fault]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise DataError(f"{path}: the column {_twice(file.schema_arrow.names)!r} stands twice: rename one")
        number = 0
        for batch in file.iter_batches(1000):
            for index in range(len(batch)):
                yield _table_row(f"{path} row {number}", batch, index)
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _table_row(place: str, batch: Any, index: int) -> Row | Fault:
    try:
        return Row(place, without_nulls({name: batch.column(name)[index].as_py() for name in batch.schema.names}))
    except ValueError as error:  # bad UTF-8 and dates that Python has not
        return Fault(place, "a value cannot be read", str(error), "write the column anew as text")


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
        yield Row(f"{name}[{split}] row {number}", without_nulls(values))


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without the keys that Arrow adds to objects inside a column, since it gives all the keys of any: a
    call's arguments are those that it has. Columns that are null stay.
    """
    return {name: _bare(value) for name, value in values.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _bare(item) for name, item in value.items() if item is not None}
    return [_bare(item) for item in value] if isinstance(value, list) else value
