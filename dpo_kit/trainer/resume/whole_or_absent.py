"""Checkpoints are written whole or not at all: aside, to the disk, then under their name. Standard library only.

A checkpoint counts once its `manifest.json`, with size and sha256 of every file, is written and the folder has its
name. Only names that mean one step, `checkpoint-<step>`, are looked at.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_kit.errors import TrainingError
from dpo_kit.run.files import finite, write_json

MANIFEST, STATE, RECORD = "manifest.json", "dpo_kit", "record"
SAVING, REMOVING, REPLACED = ".saving", ".removing", ".replaced"


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"checkpoint-{step}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Every folder with the name of a checkpoint, the newest first."""
    named = (path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(filter(Path.is_dir, named), key=lambda path: -int(path.name.rpartition("-")[2]))


def complete(aside: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Make the files of `aside` the checkpoint `final`: on the disk, with their manifest, then under its name."""
    files = {name: _describe_and_sync(path) for name, path in _files(aside)}
    content = finite({"facts": dict(facts), "files": files})
    write_json(aside / MANIFEST, {"content": content, "sha256": digest_of(content)})
    for folder in {aside, *(path.parent for _, path in _files(aside))}:
        sync_folder(folder)
    replaced = final.with_name(f"{REPLACED}-{final.name}")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def save_model(trainer: Any, folder: Path, *, last: bool = True) -> None:
    """The trainer's model as it is now, written aside so that `folder` is whole or not there; all processes call it.
    What is not the `last` one is not pushed to the hub.
    """
    aside = folder.with_name(f"{SAVING}-{folder.name}")
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(aside), _internal_call=not last)
    if trainer.is_world_process_zero():
        (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle with every argument, useless to a reader
        shutil.rmtree(aside / "ref", ignore_errors=True)  # the start of an adapter that was there before
        put_in_place(aside, folder)


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
        elif path.name not in kept:
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


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_full_disk(folder: Path, needed: int, what: str, error: type[Exception] = TrainingError) -> None:
    """`error` where the disk of `folder` has fewer than `needed` bytes free, which `what` would take."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise error(
            f"{folder}: {what} needs about {needed / 1e9:.2f} GB, free are {free / 1e9:.2f} GB: make room, choose "
            "another hydra.run.dir, or keep fewer checkpoints (trl.save_total_limit=1)"
        )
