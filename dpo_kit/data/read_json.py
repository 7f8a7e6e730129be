"""Rows of a file that is one JSON value over many lines: a list of rows, or an object that holds them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from dpo_kit.config.data_folders import is_split, split_name
from dpo_kit.data.read import Fault, Json, Row, read_lines
from dpo_kit.errors import DataError

_SPACE = re.compile(r"\s*")
NO_LIST = "must hold one JSON list of rows; one row a line is a .jsonl file"


def read_whole(path: Path, content: bytes, split: str) -> Iterator[Row | Fault]:
    """The rows of `content`, of `split` where it has several. DataError where no row can be told from it."""
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
    fields = whole.values
    lists = {
        name: rows
        for name, rows in fields.items()
        if isinstance(rows, list) and all(isinstance(row, dict) and not row.keys() & {"role", "from"} for row in rows)
    }
    rows_by_split = {split_name(name): rows for name, rows in lists.items()}
    columns = [cells for cells in fields.values() if isinstance(cells, list)]
    is_columnar = len(columns) == len(fields) > max(1, len(lists)) and len({len(cells) for cells in columns}) == 1
    only_list = len(lists) == 1 and not is_split(*lists)
    if is_columnar:
        rows = [dict(zip(fields, cells, strict=True)) for cells in zip(*columns, strict=True)]
    elif rows_by_split.get(split_name(split)):
        rows = rows_by_split[split_name(split)]
    elif only_list:
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
