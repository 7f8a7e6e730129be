"""Rows from files, folders and the hub, one plain dict each, with the place they came from.

A row that cannot be read is not raised but handed on as a `Fault`: what happens to it is decided in one place
(`data.on_bad_row`). Where an unknown number of rows is lost with it (a cut archive, a quote never closed), the file is
refused. Files are read as a stream, except one JSON value over many lines and UTF-16, whose text must be in memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.config.data_files import CELLS, KNOWN, TABLES, WHOLE, ending, find_files, is_split, near_miss, split_name
from dpo_kit.errors import DataError

MARKS = {  # byte order marks, longest first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LIST = re.compile(rb"\s*\[\s*\{")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")


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


class Tie(Fault):
    """A well-formed row that prefers no answer: left out and counted, whatever `data.on_bad_row` says."""


class UnfitError(Exception):
    """Why a row cannot be used: reason, what was found, what to do."""

    def at(self, place: str) -> Fault:
        """The same as the fault of the row at `place`."""
        return Fault(place, *self.args)


class TieError(UnfitError):
    """A well-formed row that prefers no answer."""

    def at(self, place: str) -> Fault:
        return Tie(place, *self.args)


def read_source(path: str, split: str, config: str | None = None) -> Iterator[Row | Fault]:
    """All rows of a local file, folder or pattern, or of a hub data set (its configuration `config`), of `split` where
    there are several. Raises DataError where there is nothing.
    """
    files = find_files(path, split)
    if files is None:
        yield from _read_hub(path, split, config)
    elif config is not None:
        raise DataError(f"data.config={config} means a data set of the hub, but {path} is here: name its folder itself")
    for file in files or []:
        yield from _read_file(file, split)


def _read_file(path: Path, split: str) -> Iterator[Row | Fault]:
    known = ending(path)
    if known is None:
        raise DataError(
            f"{path}: unknown kind of file; known are {', '.join(KNOWN)}, also packed as .gz or .zst: unpack it, or "
            "save it as one of them"
        )
    read = _read_table if known in TABLES else _read_cells if known in CELLS else _read_json
    place = str(path)
    try:
        for row in read(path, split):
            place = row.place
            yield row
    except (EOFError, zlib.error, OSError) as error:
        is_unpacking = isinstance(error, gzip.BadGzipFile) or path.suffix.lower() == ".zst"
        if isinstance(error, OSError) and not (is_unpacking and error.errno is None):  # zstd's own has no number
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        raise DataError(
            f"{place}: the compressed file is cut or damaged from here on ({error}), and how many rows are lost cannot "
            "be told: copy it again"
        ) from error


def _unpacked(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _open(path: Path) -> io.BufferedReader:
    """The file unpacked, as UTF-8 without a byte order mark."""
    file = io.BufferedReader(_unpacked(path))
    start = file.peek(4)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if encoding == "utf-8-sig":
        file.read(3)
    elif encoding is not None:
        try:
            return io.BufferedReader(io.BytesIO(file.read().decode(encoding).encode()))  # type: ignore[arg-type]
        except UnicodeError as error:
            raise DataError(f"{path}: begins as {encoding} and is not: {error}: save the file as UTF-8") from error
    return file


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
        if _HALF_CHARACTER.search(text, start, end) and (half := lone_surrogate(value)):
            return Fault(place, "half a character", half, "write the text anew as UTF-8"), end
        return Row(place, value), end


def _twice(names: Any) -> str:
    return Counter(names).most_common(1)[0][0]


def lone_surrogate(value: Any) -> str | None:
    """The first half of a character without its other half in the texts of a JSON value, as words; None: no such."""
    half = _SURROGATE.search(json.dumps(value, ensure_ascii=False))
    return half and f"\\u{ord(half[0]):x} without its other half"


def _read_json(path: Path, split: str) -> Iterator[Row | Fault]:
    """One row a line, or one JSON value: a list of rows, or an object that holds them."""
    with _open(path) as file:
        if ending(path) in WHOLE or _LIST.match(file.peek()):
            yield from _read_whole(path, file.read(), split)
        else:
            yield from _read_lines(path, file)


def _read_lines(path: Path, file: Iterable[bytes]) -> Iterator[Row | Fault]:
    parser = _Json()
    for number, line in enumerate(map(bytes.strip, file), start=1):
        if not line:
            continue
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
            row, end = parser.row(place, text)
            if end < len(text):
                row = Fault(place, "not JSON", f"Extra data at column {end + 1}", "one object a line")
            yield row
        except UnicodeDecodeError as error:
            yield Fault(place, "not UTF-8", f"byte {error.start} is {line[error.start]:#x}", "save the file as UTF-8")
        except json.JSONDecodeError as error:
            cut = error.pos >= len(text) or error.msg.startswith("Unterminated")
            remedy = "the line is cut: copy the file again, or remove it" if cut else "mend the line"
            remedy = "write each object on one line" if text in ("{", "[") else remedy
            remedy = "the file looks like UTF-16: save it as UTF-8" if "\0" in text else remedy
            yield Fault(place, "not JSON", f"{error.msg} at column {error.colno}", remedy)
        except (ValueError, RecursionError) as error:
            yield Fault(place, "not JSON", str(error), "mend the line")


def _read_whole(path: Path, content: bytes, split: str) -> Iterator[Row | Fault]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _read_list(path, text, start)
        return
    if text[start : start + 1] != "{":
        raise DataError(f"{path} must hold one JSON list of rows; one row a line is a .jsonl file")
    whole, end = _element(_Json(), path, 0, text, start)
    if end == len(text.rstrip()):
        yield from _read_object(path, whole, split)
    elif "\n" not in text[start:end]:
        yield from _read_lines(path, io.BytesIO(content))
    else:
        raise _broken(path, text, end, "several objects over several lines, which make no list")


def _read_object(path: Path, whole: Row | Fault, split: str) -> Iterator[Row | Fault]:
    """Rows of {"data": [rows]}, of {split: [rows]} or of {column: [values]}."""
    if isinstance(whole, Fault):
        raise DataError(f"{path}: {whole.reason} ({whole.found}): {whole.remedy}")
    given = whole.values
    lists = {
        name: rows
        for name, rows in given.items()
        if isinstance(rows, list) and all(isinstance(row, dict) and not row.keys() & {"role", "from"} for row in rows)
    }
    by_split = {split_name(name): rows for name, rows in lists.items()}
    columns = [cells for cells in given.values() if isinstance(cells, list)]
    if len(given) > max(1, len(lists)) and len(columns) == len(given) and len({len(cells) for cells in columns}) == 1:
        rows = [dict(zip(given, cells, strict=True)) for cells in zip(*columns, strict=True)]
    elif by_split.get(split_name(split)):
        rows = by_split[split_name(split)]
    elif len(lists) == 1 and not is_split(*lists):
        (rows,) = lists.values()
    else:
        has = f"; it has the lists {', '.join(lists)}: data.train_split and data.eval_split say which" if lists else ""
        raise DataError(f"{path} must hold one JSON list of rows; one row a line is a .jsonl file{has}")
    for number, row in enumerate(rows):
        yield Row(f"{path} row {number}", row)


def _read_list(path: Path, text: str, start: int) -> Iterator[Row | Fault]:
    """The rows of one JSON list, decoded one by one, so that a fault inside a row does not cost the others."""
    parser, number, sign = _Json(), 0, ","
    position = _skip(text, start + 1)
    if text[position : position + 1] == "]":
        return
    while sign == ",":
        row, position = _element(parser, path, number, text, position)
        yield row
        number += 1
        position = _skip(text, position)
        sign = text[position : position + 1]
        if sign not in (",", "]"):
            raise _broken(path, text, position, "expecting ',' or ']'")
        position = _skip(text, position + 1)
    if position < len(text):
        raise _broken(path, text, position, "text after the list")


def _element(parser: _Json, path: Path, number: int, text: str, position: int) -> tuple[Row | Fault, int]:
    try:
        return parser.row(f"{path} row {number}", text, position)
    except json.JSONDecodeError as error:
        raise _broken(path, text, error.pos, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, text, position, str(error)) from error


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _broken(path: Path, text: str, position: int, why: str) -> DataError:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    cut = " (the file is cut)" if position >= len(text) else ""
    return DataError(f"{path}:{line}: not JSON: {why} at column {column}{cut}: mend or copy the file again")


# --- CSV, Parquet, hub -------------------------------------------------------------------------------------------


def _read_cells(path: Path, _split: str) -> Iterator[Row | Fault]:
    """CSV with a header, parted by whatever parts the header's cells; every cell stays the text that it is."""
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(_open(path), encoding="utf-8", errors="surrogateescape", newline="") as file:
        first = file.readline()
        bare = re.sub('"[^"]*"', "", first)
        delimiter = "\t" if ending(path) == ".tsv" else "," if "," in bare else max(",;\t|", key=bare.count)
        records = csv.reader(itertools.chain([first], file), strict=True, delimiter=delimiter)
        names: list[str]
        try:
            names = next(records, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: the header is not CSV: {error}; save the file as CSV in UTF-8") from error
        if not any(names):
            raise DataError(f"{path}:1: a CSV file needs a header line with the names of its columns")
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: the column {_twice(names)!r} stands twice: rename one")
        while True:
            place = f"{path}:{records.line_num + 1}"
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):
                    message = f"{place}: a quote that opens here is never closed: double it, or close it"
                    raise DataError(message) from error
                amiss = f"{error}, up to line {records.line_num}"
                yield Fault(place, "not CSV", amiss, "quote the cell, double its quotes")
                continue
            broken = next((name for name, cell in zip(names, cells, strict=False) if _SURROGATE.search(cell)), None)
            if cells and len(cells) != len(names):
                count = f"{len(cells)}, the header has {len(names)}"
                yield Fault(place, "wrong number of cells", count, "quote commas and other delimiters")
            elif broken is not None:
                yield Fault(place, "not UTF-8", f"in column {broken!r}", "save the file as UTF-8")
            elif cells:
                yield Row(place, dict(zip(names, cells, strict=True)), typed=False)


def _read_table(path: Path, _split: str) -> Iterator[Row | Fault]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: the column {_twice(names)!r} stands twice: rename one")
            for index in range(len(batch)):
                place = f"{path} row {number}"
                number += 1
                try:
                    yield Row(place, without_nulls({name: batch.column(name)[index].as_py() for name in names}))
                except ValueError as error:  # bad UTF-8 and dates that Python has not
                    yield Fault(place, "a value cannot be read", str(error), "write the column anew as text")
    except (OSError, pyarrow.ArrowException) as error:
        kind = "Parquet" if ending(path) == ".parquet" else "Arrow"
        raise DataError(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}") from error


def _batches(path: Path) -> Iterator[Any]:
    """Record batches of a Parquet file, or of an Arrow file or stream, as datasets writes them."""
    import pyarrow
    import pyarrow.parquet

    if ending(path) == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(1000)
        return
    with pyarrow.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)


def _read_hub(name: str, split: str, config: str | None) -> Iterator[Row | Fault]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the libraries below raise many kinds; all mean that there is nothing to read
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "; name one with data.config" if "onfig name is missing" in reason else ""
        remedy = "; name one with data.train_split or data.eval_split" if "nknown split" in reason else remedy
        raise DataError(
            f"{name!r} is neither a local file or folder nor a hub data set that can be reached (split {split!r}, "
            f"configuration {config!r}): {reason}{remedy}{near_miss(name)}"
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
