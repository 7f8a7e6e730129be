"""Rows from files, folders and the hub, one plain dict each, with the place they came from.

A row that cannot be read is not raised but handed on as a `Fault`: what happens to it is decided in one place
(`data.on_bad_row`). Where an unknown number of rows is lost with it (a cut archive, a quote never closed), the file is
refused. Files are read as a stream, except one JSON value over many lines and UTF-16, whose text must be in memory.
"""

import codecs
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.config.data_files import CELLS, KNOWN, TABLES, WHOLE, ending, find_files
from dpo_kit.errors import DataError

MARKS = {  # byte order marks, longest first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SURROGATE = re.compile("[\ud800-\udfff]")
_LIST = re.compile(rb"\s*\[\s*\{")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


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

    fault: type[Fault] = Fault

    def at(self, place: str) -> Fault:
        """The same as the fault of the row at `place`."""
        return self.fault(place, *self.args)


class TieError(UnfitError):
    """A well-formed row that prefers no answer."""

    fault = Tie


def read_source(path: str, split: str, config: str | None = None) -> Iterator[Row | Fault]:
    """All rows of a file, folder, pattern or hub data set, of `split` where there are several. Raises DataError."""
    files = find_files(path, split)
    if files is None:
        from dpo_kit.data.read_files import read_hub

        yield from read_hub(path, split, config)
    elif config is not None:
        raise DataError(f"data.config={config} means a data set of the hub, but {path} is here: name its folder itself")
    for file in files or []:
        yield from _read_file(file, split)


def read_whole(key: str, path: str, split: str = "test") -> list[Row]:
    """All rows of what `key` names, of which none may be at fault. DataError for the first one that is."""
    rows = []
    try:
        for row in read_source(path, split):
            if isinstance(row, Fault):
                raise DataError(str(row))
            rows.append(row)
    except DataError as error:
        raise DataError(f"{key}={path}: {error}") from error
    return rows


def _read_file(path: Path, split: str) -> Iterator[Row | Fault]:
    if (known := ending(path)) is None:
        kinds = f"known are {', '.join(KNOWN)}, also packed as .gz or .zst"
        raise DataError(f"{path}: unknown kind of file; {kinds}: unpack it, or save it as one of them")
    last_good_place = str(path)
    try:
        if known in TABLES or known in CELLS:
            from dpo_kit.data.read_files import read_cells, read_table

            rows = read_table(path) if known in TABLES else read_cells(path)
        else:
            rows = _read_json(path, known, split)
        for row in rows:
            last_good_place = row.place
            yield row
    except (EOFError, zlib.error, OSError) as error:
        # errors of what unpacks a file, by which it is damaged, have no number
        unpacks = isinstance(error, gzip.BadGzipFile) or path.suffix.lower() == ".zst"
        if isinstance(error, OSError) and not (unpacks and error.errno is None):
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        amiss = f"the compressed file is cut or damaged from here on ({error})"
        lost = "and how many rows are lost cannot be told: copy it again"
        raise DataError(f"{last_good_place}: {amiss}, {lost}") from error


def open_utf8(path: Path) -> io.BufferedReader:
    """The file unpacked, as UTF-8 without a byte order mark."""
    raw: Any
    if path.suffix.lower() == ".zst":
        import pyarrow

        raw = pyarrow.input_stream(str(path), compression="zstd")
    else:
        raw = gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # noqa: SIM115 - the caller's
    file = io.BufferedReader(raw)
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


class Json:
    """Strict JSON: what is amiss inside a value is noted, not raised, so that reading goes on behind it."""

    def __init__(self) -> None:
        self._amiss: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = {sys.intern(key): value for key, value in pairs}
        if len(made) < len(pairs):
            self._amiss.append(f"key {twice(key for key, _ in pairs)!r} stands twice")
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


def twice(names: Any) -> str:
    return Counter(names).most_common(1)[0][0]


def lone_surrogate(value: Any) -> str | None:
    """The first half of a character without its other half in the texts of a JSON value, as words; None: no such."""
    half = SURROGATE.search(json.dumps(value, ensure_ascii=False))
    return half and f"\\u{ord(half[0]):x} without its other half"


def _read_json(path: Path, known: str, split: str) -> Iterator[Row | Fault]:
    """One row a line, or one JSON value over many: a list of rows, or an object that holds them."""
    with open_utf8(path) as file:
        if known not in WHOLE and not _LIST.match(file.peek()):
            yield from read_lines(path, file)
            return
        content = file.read()
    from dpo_kit.data.read_files import read_value

    yield from read_value(path, content, split)


def read_lines(path: Path, file: Iterable[bytes]) -> Iterator[Row | Fault]:
    parser = Json()
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
            remedy = "mend the line"
            if "\0" in text:
                remedy = "the file looks like UTF-16: save it as UTF-8"
            elif text in ("{", "["):
                remedy = "write each object on one line"
            elif error.pos >= len(text) or error.msg.startswith("Unterminated"):
                remedy = "the line is cut: copy the file again, or remove it"
            yield Fault(place, "not JSON", f"{error.msg} at column {error.colno}", remedy)
        except (ValueError, RecursionError) as error:
            yield Fault(place, "not JSON", str(error), "mend the line")
