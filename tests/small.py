"""Whole runs on the embedded model that take seconds, and what is compared of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from dpo_kit.data.rows import ANSWERS, Kind
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import read_metrics
from dpo_kit.toy import TRAIN

SMALL = [
    "tracking=none",
    "trl.max_steps=4",
    "trl.eval_steps=2",
    "trl.per_device_train_batch_size=4",
    "callbacks.pairs=16",
    "callbacks.prompts=8",
]
TIMES = ("time", "_runtime", "_per_second")


def write_pairs(file: Path, count: int = 40) -> Path:
    """The first embedded pairs as a file."""
    file.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:count]))
    return file


def few_pairs(file: Path) -> list[str]:
    """Overrides of a run that takes seconds, on 40 embedded pairs in `file`, of which 24 are trained on."""
    return [*SMALL, f"data.train={write_pairs(file)}", "data.eval=null", "data.holdout=0.4"]


def as_texts(rows: list[dict[str, Any]], kind: Kind) -> Dataset:
    """Prepared rows as stock TRL takes them, which tokenises them itself."""
    names = ("prompt", *ANSWERS[kind], *(("label",) if kind == "unary" else ()))
    return Dataset.from_list([{name: row[name] for name in names} for row in rows])


def hash_model(folder: Path) -> str:
    """One hash over the weights of a run's model or adapter."""
    total = hashlib.sha256()
    for file in sorted(RunDirectory(Path(folder)).model.glob("*.safetensors")):
        total.update(file.read_bytes())
    return total.hexdigest()


def rows_of(folder: Path) -> dict[str, list[str]]:
    """The record of a run, line by line, without its times."""
    run = RunDirectory(Path(folder))
    lines = {"metrics.jsonl": [json.dumps(_timeless(row)) for row in read_metrics(run.metrics)]}
    for path in (run.probe, run.samples):
        lines[path.name] = path.read_text().splitlines() if path.exists() else []
    return lines


def _timeless(row):
    return {key: value for key, value in row.items() if not key.endswith(TIMES)}


def differences(one: Path, other: Path) -> list[str]:
    """Where two runs differ: weights, or the first line of a file of the record; empty where they are equal."""
    found = [] if hash_model(one) == hash_model(other) else ["weights"]
    here, there = rows_of(one), rows_of(other)
    for name, lines in here.items():
        pairs = list(zip(lines, there[name], strict=False))
        unequal = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
        if unequal is not None:
            found.append(f"{name}:{unequal + 1}: {_differing(*pairs[unequal])}")
        elif len(lines) != len(there[name]):
            found.append(f"{name}: {len(lines)} and {len(there[name])} lines")
    return found


def _differing(one: str, other: str) -> str:
    first, second = json.loads(one), json.loads(other)
    keys = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    return ", ".join(f"{key} {first.get(key)} | {second.get(key)}" for key in sorted(keys)[:4])
