"""An append-only file of keyed rows, of what cost time or money, that survives a kill: no row lost, none twice."""

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from dpo_kit.errors import ConfigError, DataError

log = logging.getLogger(__name__)


class Journal:
    """The rows of the JSONL file at `path` by their key; to be closed, or used in a `with`. Threads may share it,
    processes may not: ConfigError where another one holds it. DataError names a line that is damaged; a last one that a
    kill cut off is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._process = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            self._process.acquire()
        except Timeout:
            raise ConfigError(f"{path} is being written by another process: wait for it, or end it") from None
        self._threads = threading.Lock()
        self.rows: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            log.warning("%s: its last line was cut off and is made again", path)
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            place, remedy = f"{path}:{number}", "delete that line, and its row is made again"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place} is damaged ({error}): {remedy}") from error
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                raise DataError(f"{place} has no key: {remedy}")
            self.rows.setdefault(row.pop("key"), row)
        self._file = path.open("ab", buffering=0)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep `row` under `key`; a key that is there stays as it is."""
        self.add_all({key: row})

    def add_all(self, rows: dict[str, dict[str, Any]]) -> None:
        """Keep several rows, by their keys, with one wait for the disk."""
        with self._threads:
            new = {key: row for key, row in rows.items() if key not in self.rows}
            lines = b"".join(json.dumps({"key": key, **row}).encode() + b"\n" for key, row in new.items())
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(lines):  # a disk that fills up takes a part, then refuses the rest
                    written += self._file.write(lines[written:])
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise
            self.rows |= new

    def close(self) -> None:
        self._file.close()
        self._process.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def key_of(*parts: Any) -> str:
    """32 hex digits that stand for `parts`, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
