"""The run directory: what its files are called and how they are written. Standard library only.

A run directory is the only thing that passes between training, sweeps, evaluation and export; `result.json` is
written last, so that it means "this run has ended, and this is how".
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run's files. `root` need not exist yet."""

    root: Path

    manifest = property(lambda self: self.root / "manifest.json")
    trl_config = property(lambda self: self.root / "trl_config.json")
    data_report = property(lambda self: self.root / "data_report.json")
    dropped_rows = property(lambda self: self.root / "dropped_rows.jsonl")
    metrics = property(lambda self: self.root / "metrics.jsonl")
    probe = property(lambda self: self.root / "probe.jsonl")
    probe_state = property(lambda self: self.root / "probe_state")
    samples = property(lambda self: self.root / "samples.jsonl")
    preview = property(lambda self: self.root / "preview.json")
    checkpoints = property(lambda self: self.root / "checkpoints")
    model = property(lambda self: self.root / "model")
    picture = property(lambda self: self.root / "report.png")
    page = property(lambda self: self.root / "report.md")
    result = property(lambda self: self.root / "result.json")
    test = property(lambda self: self.root / "test.json")
    judge = property(lambda self: self.root / "judge")
    evaluation = property(lambda self: self.root / "evaluation")
    export = property(lambda self: self.root / "export")
    reproduction = property(lambda self: self.root / "reproduce")
    wandb_file = property(lambda self: self.root / "wandb_id")

    def read_result(self) -> dict[str, Any] | None:
        """How the run ended, or None where it has not."""
        return read_json(self.result) if self.result.exists() else None

    def wandb_id(self, wanted: str | None = None) -> str:
        """The id of this run's wandb run, the same whenever the run goes on; `wanted` where it has none yet."""
        if not self.wandb_file.exists():
            write_text(self.wandb_file, wanted or secrets.token_hex(4))
        return self.wandb_file.read_text()

    def record(self) -> dict[str, Path]:
        """The files that grow with the run, by name: a resumed run takes them back from its checkpoint."""
        kept = [*self.probe_state.glob("*.pt"), self.metrics, self.probe, self.samples, self.wandb_file]
        return {path.relative_to(self.root).as_posix(): path for path in kept}


def cache_folder(name: str) -> Path:
    """Where things are kept that several runs share: under `DPO_KIT_CACHE`, else under the user's cache folder; where
    neither can be written, in a folder that ends with this process.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~").expanduser() / ".cache")
    shared = Path(os.environ.get("DPO_KIT_CACHE") or user / "dpo_kit").absolute()
    nearest = next(folder for folder in (shared, *shared.parents) if folder.exists())
    usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return (shared if usable else _own_cache(shared)) / name


@cache
def _own_cache(shared: Path) -> Path:
    log.warning("%s cannot be written, so that later runs share nothing with this one; DPO_KIT_CACHE=DIR helps", shared)
    folder = tempfile.mkdtemp(prefix="dpo_kit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`value` as strict JSON (a number that is not finite becomes null), complete or not there at all."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def hash_weights(path: str | Path) -> str | None:
    """sha256 over the safetensors files of a local folder; None for a hub id (its revision names the weights)."""
    files = sorted(Path(path).expanduser().glob("*.safetensors"))
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest() if files else None


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity as None, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
