"""Rows of all that is no JSON line by line: whole JSON, CSV, Parquet, Arrow, and the data sets of the hub."""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_kit.config.data_files import ending, near_miss
from dpo_kit.config.data_folders import SPLITS, split_name
from dpo_kit.data.read import SURROGATE, Fault, Json, Row, open_utf8, read_lines, twice
from dpo_kit.errors import DataError

NO_LIST = "must hold one JSON list of rows; one row a line is a .jsonl file"
_SPACE = re.compile(r"\s*")


def read_value(path: Path, content: bytes, split: str) -> Iterator[Row | Fault]:
    """The rows of `content`, the text of the file at `path`; where it holds rows of several splits those of `split`."""
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
        raise DataError(f"{path} {NO_LIST}")
    whole, end = _element(Json(), path, 0, text, start)
    if end == len(text.rstrip()):
        yield from _read_object(path, whole, split)
    elif "\n" not in text[start:end]:
        yield from read_lines(path, io.BytesIO(content))
    else:
        raise _broken(path, text, end, "several objects over several lines, which make no list")


def _read_object(path: Path, whole: Row | Fault, split: str) -> Iterator[Row | Fault]:
    """Rows of {"data": [rows]}, of {split: [rows]} or of {column: [values]}."""
    if isinstance(whole, Fault):
        raise DataError(f"{path}: {whole.reason} ({whole.found}): {whole.remedy}")
    columns = {name: cells for name, cells in whole.values.items() if isinstance(cells, list)}

    def are_rows(cells: list[Any]) -> bool:
        return all(isinstance(cell, dict) and not cell.keys() & {"role", "from"} for cell in cells)

    lists = {name: cells for name, cells in columns.items() if are_rows(cells)}
    of_split = {split_name(name): rows for name, rows in lists.items()}.get(split_name(split))
    one_length = len({len(cells) for cells in columns.values()}) == 1
    if one_length and len(columns) == len(whole.values) > max(1, len(lists)):
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    elif of_split:
        rows = of_split
    elif len(lists) == 1 and not {name.lower() for name in lists} & SPLITS.keys():
        (rows,) = lists.values()
    else:
        has = f"; it has the lists {', '.join(lists)}: data.train_split and data.eval_split say which" if lists else ""
        raise DataError(f"{path} {NO_LIST}{has}")
    for number, row in enumerate(rows):
        yield Row(f"{path} row {number}", row)


def _read_list(path: Path, text: str, start: int) -> Iterator[Row | Fault]:
    """The rows of one JSON list, decoded one by one, so that a fault inside a row does not cost the others."""
    parser, number, sign = Json(), 0, ","
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


def _element(parser: Json, path: Path, number: int, text: str, position: int) -> tuple[Row | Fault, int]:
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


# --- tables ------------------------------------------------------------------------------------------------------


def read_cells(path: Path) -> Iterator[Row | Fault]:
    """CSV with a header, parted by whatever parts the header's cells; every cell stays the text that it is."""
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(open_utf8(path), encoding="utf-8", errors="surrogateescape", newline="") as file:
        first = file.readline()
        bare = re.sub('"[^"]*"', "", first)
        delimiter = "\t" if ending(path) == ".tsv" else "," if "," in bare else max(",;\t|", key=bare.count)
        records = csv.reader(itertools.chain([first], file), strict=True, delimiter=delimiter)
        try:
            names: list[str] = next(records, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: the header is not CSV: {error}; save the file as CSV in UTF-8") from error
        if SURROGATE.search("".join(names)):
            raise DataError(f"{path}:1: the names of the columns are not UTF-8: save the file as UTF-8")
        if not any(names):
            raise DataError(f"{path}:1: a CSV file needs a header line with the names of its columns")
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: the column {twice(names)!r} stands twice: rename one")
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
            broken = next((name for name, cell in zip(names, cells, strict=False) if SURROGATE.search(cell)), None)
            if cells and len(cells) != len(names):
                count = f"{len(cells)}, the header has {len(names)}"
                yield Fault(place, "wrong number of cells", count, "quote commas and other delimiters")
            elif broken is not None:
                yield Fault(place, "not UTF-8", f"in column {broken!r}", "save the file as UTF-8")
            elif cells:
                yield Row(place, dict(zip(names, cells, strict=True)), typed=False)


def read_table(path: Path) -> Iterator[Row | Fault]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: the column {twice(names)!r} stands twice: rename one")
            for index in range(len(batch)):
                place = f"{path} row {number}"
                number += 1
                try:
                    yield Row(place, {name: without_nulls(batch.column(name)[index].as_py()) for name in names})
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


def read_hub(name: str, split: str, config: str | None) -> Iterator[Row | Fault]:
    """The rows of a data set of the hub. DataError where it cannot be had."""
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the libraries below raise many kinds; all mean that there is nothing to read
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "; name one with data.train_split or data.eval_split" if "unknown split" in reason.lower() else ""
        remedy = "; name one with data.config" if "config name is missing" in reason.lower() else remedy
        raise DataError(
            f"{name!r} is neither a local file or folder nor a hub data set that can be reached (split {split!r}, "
            f"configuration {config!r}): {reason}{remedy}{near_miss(name)}"
        ) from error
    for number, values in enumerate(rows):
        yield Row(f"{name}[{split}] row {number}", {column: without_nulls(value) for column, value in values.items()})


def without_nulls(value: Any) -> Any:
    """`value` without null keys of objects: Arrow gives each the keys of all, a call the arguments of every other."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
