"""Rows of the files that an evaluation is given: answers, questions, labels, annotations."""

from __future__ import annotations

from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.errors import DataError


def read_rows(key: str, path: str) -> list[Row]:
    """All rows of the file that `key` names, of any kind that training reads. DataError for the first one at fault."""
    rows = []
    try:
        for row in read_source(path, "test"):
            if isinstance(row, Fault):
                raise DataError(str(row))
            rows.append(row)
    except DataError as error:
        raise DataError(f"{key}={path}: {error}") from error
    return rows
