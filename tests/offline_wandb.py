"""Read back what an offline wandb run recorded: the transaction log `run-<id>.wandb` (leveldb log framing)."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2 as pb

BLOCK = 32768
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """run: the last RunRecord; history: one dict per row; metrics: the calls of define_metric."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    exit_code: int | None = None


def log_files(run_dir: Path) -> list[Path]:
    """The transaction logs of the offline runs under `run_dir`, oldest first."""
    return sorted(Path(run_dir).glob("wandb/offline-run-*/run-*.wandb"))


def read_offline(path: Path) -> OfflineRun:
    """Everything that one transaction log holds. wandb writes its last lines after `finish`, so it is ended first."""
    wandb.teardown()
    found = OfflineRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            _update(found.config, record.run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "summary":
            _update(found.summary, record.summary.update)
        elif kind == "history":
            found.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "metric":
            found.metrics.append(record.metric)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _key(item: Any) -> str:
    return ".".join(item.nested_key) or item.key


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        place = target
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = json.loads(item.value_json)


def _records(data: bytes) -> Iterator[Any]:
    assert data[:4] == b":W&B", data[:8]
    place, parts = 7, []
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:  # padding at the end of a block
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        body = data[place + 7 : place + 7 + size]
        if len(body) < size:  # a killed run: torn tail
            return
        place += 7 + size
        parts += [body] if kind else []
        if kind in (FULL, LAST):
            yield pb.Record.FromString(b"".join(parts))
            parts = []
