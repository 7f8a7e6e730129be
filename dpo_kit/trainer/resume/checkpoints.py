"""Checkpoints on disk: complete or absent, checked before they are used, broken ones set aside. Standard library only.

A checkpoint is written aside; it counts once its `manifest.json`, with size and sha256 of every file, is written and
the folder has its name. Only names that mean one step, `checkpoint-<step>`, are looked at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from dpo_kit.errors import ConfigError, TrainingError
from dpo_kit.run.files import finite, read_json, write_json

MANIFEST, STATE, RECORD = "manifest.json", "dpo_kit", "record"
SAVING, REMOVING, REPLACED, BROKEN, EARLIER = ".saving", ".removing", ".replaced", "broken", "earlier"
log = logging.getLogger(__name__)


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"checkpoint-{step}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Every folder with the name of a checkpoint, the newest first."""
    named = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in checkpoints.glob("checkpoint-*")}
    found = {path: int(name[1]) for path, name in named.items() if name and path.is_dir()}
    return sorted(found, key=lambda path: -found[path])


# --- writing -----------------------------------------------------------------------------------------------------


def complete(aside: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Make the files of `aside` the checkpoint `final`: on the disk, with their manifest, then under its name."""
    files = {name: _describe_and_sync(path) for name, path in _files(aside)}
    content = finite({"facts": dict(facts), "files": files})
    write_json(aside / MANIFEST, {"content": content, "sha256": _digest(content)})
    for folder in {aside, *(path.parent for _, path in _files(aside))}:
        sync_folder(folder)
    replaced = final.with_name(f"{REPLACED}-{final.name}")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def put_in_place(aside: Path, folder: Path) -> None:
    """The files of `aside`, once they are on the disk, take the place of `folder`."""
    for _, path in _files(aside):
        _describe_and_sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    sync_folder(folder.parent)


def rotate(checkpoints: Path, keep: int | None, best: str | None) -> None:
    """Remove complete checkpoints beyond the newest `keep` and the best one; the newest complete one always stays."""
    if not keep or keep < 0:
        return
    whole = [path for path in list_checkpoints(checkpoints) if (path / MANIFEST).exists()]
    kept = {path.name for path in whole if path == whole[0] or (best and path.name == Path(best).name)}
    for path in whole:
        if len(kept) < keep:
            kept.add(path.name)
    for path in whole:
        if path.name not in kept:
            gone = path.with_name(f"{REMOVING}-{path.name}")  # half of a checkpoint must not look like one
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """The names in `folder` are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            yield path.relative_to(folder).as_posix(), path


def _describe_and_sync(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- reading -----------------------------------------------------------------------------------------------------


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What `complete` was told about the checkpoint."""
    return read_json(checkpoint / MANIFEST)["content"]["facts"]


def find_fault(checkpoint: Path) -> str | None:
    """Why the checkpoint cannot be used, or None: every file is read and compared with the manifest."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        if _digest(manifest["content"]) != manifest["sha256"]:
            return f"{MANIFEST} is damaged"
        files = manifest["content"]["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    faults = (_file_fault(checkpoint / name, expected) for name, expected in files.items())
    return next((fault for fault in faults if fault), None)


def _file_fault(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, not {expected['bytes']}"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return None if same else f"{path.name} has other bytes than were written"


def newest_verified(checkpoints: Path, *, writer: bool = True) -> Path | None:
    """The newest checkpoint that is whole; the `writer` sets broken ones aside under another name, and deletes none.

    Raises ConfigError for one that was not written by dpo_kit: nothing says whether it is whole.
    """
    if writer:
        tidy(checkpoints)
    for path in list_checkpoints(checkpoints):
        fault = find_fault(path)
        if fault is None:
            return path
        refuse_foreign(path)
        if writer:
            set_aside(path, fault)
    return None


def refuse_foreign(checkpoint: Path) -> None:
    """ConfigError where the checkpoint is plain TRL's."""
    if not any((checkpoint / name).exists() for name in (MANIFEST, f"{STATE}.pt", RECORD)):
        raise ConfigError(
            f"{checkpoint} has no {MANIFEST}: it was not written by dpo_kit (or by an early version), so nothing says "
            "whether it is whole. Start anew with resume=never or in another hydra.run.dir, or train on from its "
            f"weights with model=local model.path={checkpoint}"
        )


def set_aside(checkpoint: Path, fault: str) -> None:
    """Give a broken checkpoint a name under which nothing looks for it."""
    target = _rename(checkpoint, BROKEN)
    log.warning("%s is broken (%s): set aside as %s", checkpoint, fault, target.name)


def put_by_later(checkpoints: Path, step: int) -> None:
    """Give checkpoints after `step` another name: a run that starts again there must not take them for its own."""
    for path in list_checkpoints(checkpoints):
        if int(path.name.rpartition("-")[2]) > step:
            target = _rename(path, EARLIER)
            log.warning("%s is later than the start of this run: put by as %s", path, target.name)


def _rename(checkpoint: Path, mark: str) -> Path:
    names = (f"{mark}-{checkpoint.name}" + (f"-{number}" if number else "") for number in count())
    target = next(target for name in names if not (target := checkpoint.with_name(name)).exists())
    return checkpoint.rename(target)


def tidy(checkpoints: Path) -> None:
    """After a crash: a checkpoint that was about to be replaced comes back, one half written or half removed goes."""
    for path in checkpoints.glob(f"{REPLACED}-*"):
        final = path.with_name(path.name.removeprefix(f"{REPLACED}-"))
        if not final.exists():
            path.rename(final)
    for mark in (SAVING, REMOVING, REPLACED):
        for path in checkpoints.glob(f"{mark}-*"):
            log.info("%s was not finished: removed", path)
            shutil.rmtree(path, ignore_errors=True)


# --- room on the disk --------------------------------------------------------------------------------------------


def refuse_full_disk(folder: Path, needed: int, what: str, error: type[Exception] = TrainingError) -> None:
    """`error` where the disk of `folder` has fewer than `needed` bytes free, which `what` would take."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise error(
            f"{folder}: {what} needs about {needed / 1e9:.2f} GB, free are {free / 1e9:.2f} GB: make room, choose "
            "another hydra.run.dir, or keep fewer checkpoints (trl.save_total_limit=1)"
        )


def explain_full_disk(error: OSError, folder: Path) -> Exception:
    """`error` itself, or what to do where it says that nothing more can be written."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    free = shutil.disk_usage(folder).free / 1e9
    return TrainingError(
        f"{folder} cannot be written ({error}); {free:.2f} GB are free on its disk. The last checkpoint is as it was: "
        "make room, and the same command goes on from there"
    )
