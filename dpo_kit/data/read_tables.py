"""Rows of tables: CSV, Parquet, Arrow, and the data sets of the hub."""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_kit.config.data_files import ending, near_miss
from dpo_kit.data.read import SURROGATE, Fault, Row, open_utf8, twice
from dpo_kit.errors import DataError


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
