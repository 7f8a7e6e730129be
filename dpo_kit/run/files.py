"""How files are written, read and told apart: whole or not at all, strict JSON."""

import atexit
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """What runs share: under `DPO_KIT_CACHE`, else the user's cache; else (not writable) a temporary folder."""
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


@cache
def texts(file: str) -> Any:
    """What stands beside the module `file` in a YAML file of its name: its sentences."""
    import yaml

    return yaml.safe_load(Path(file).with_suffix(".yaml").read_text(encoding="utf-8"))


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


def digest(value: Any) -> str:
    """A short content hash, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
