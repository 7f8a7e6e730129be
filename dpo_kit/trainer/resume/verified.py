"""Which checkpoints on the disk can be used: each is read and compared with its manifest, broken ones are set aside."""

import hashlib
import logging
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from dpo_kit.config.identity import describe_difference
from dpo_kit.config.settings import Settings
from dpo_kit.errors import ConfigError
from dpo_kit.run.files import read_json
from dpo_kit.trainer.resume.whole_or_absent import (
    MANIFEST,
    RECORD,
    REMOVING,
    REPLACED,
    SAVING,
    STATE,
    digest_of,
    list_checkpoints,
)

log = logging.getLogger(__name__)


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What `complete` was told about the checkpoint."""
    return read_json(checkpoint / MANIFEST)["content"]["facts"]


def find_fault(checkpoint: Path) -> str | None:
    """Why the checkpoint cannot be used, or None: every file is read and compared with the manifest."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        if digest_of(manifest["content"]) != manifest["sha256"]:
            return f"{MANIFEST} is damaged"
        files = manifest["content"]["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for path, expected in ((checkpoint / name, expected) for name, expected in files.items()):
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{path.name} has {size} bytes, not {expected['bytes']}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{path.name} has other bytes than were written"
        except FileNotFoundError:
            return f"{path.name} is missing"
        except OSError as error:
            return f"{path.name} cannot be read ({error})"
    return None


def newest_verified(checkpoints: Path, *, writer: bool = True) -> Path | None:
    """The newest checkpoint that is whole; the `writer` sets broken ones aside under another name, and deletes none.

    Raises ConfigError for one that was not written by dpo_kit: nothing says whether it is whole.
    """
    if writer:
        for path in checkpoints.glob(f"{REPLACED}-*"):  # after a crash: one that was about to be replaced comes back
            final = path.with_name(path.name.removeprefix(f"{REPLACED}-"))
            if not final.exists():
                path.rename(final)
        for path in (path for mark in (SAVING, REMOVING, REPLACED) for path in checkpoints.glob(f"{mark}-*")):
            log.info("%s was not finished: removed", path)  # half written, or half removed
            shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(checkpoints):
        if (fault := find_fault(path)) is None:
            return path
        refuse_foreign(path)
        if writer:
            target = _rename(path, "broken")
            log.warning("%s is broken (%s): set aside as %s", path, fault, target.name)
    return None


def refuse_foreign(checkpoint: Path) -> None:
    """ConfigError where the checkpoint is plain TRL's."""
    if not any((checkpoint / name).exists() for name in (MANIFEST, f"{STATE}.pt", RECORD)):
        raise ConfigError(
            f"{checkpoint} has no {MANIFEST}: it was not written by dpo_kit (or by an early version), so nothing says "
            "whether it is whole. Start anew with resume=never or in another hydra.run.dir, or train on from its "
            f"weights with model=local model.path={checkpoint}"
        )


def put_by_later(checkpoints: Path, step: int) -> None:
    """Give checkpoints after `step` another name: a run that starts again there must not take them for its own."""
    for path in list_checkpoints(checkpoints):
        if int(path.name.rpartition("-")[2]) > step:
            target = _rename(path, "earlier")
            log.warning("%s is later than the start of this run: put by as %s", path, target.name)


def _rename(checkpoint: Path, mark: str) -> Path:
    """A name under which nothing looks for it."""
    names = (f"{mark}-{checkpoint.name}" + (f"-{number}" if number else "") for number in count())
    target = next(target for name in names if not (target := checkpoint.with_name(name)).exists())
    return checkpoint.rename(target)


INEXACT = {
    "sync_ref_model": ": the reference that it has moved is in no checkpoint",
    "save_only_model": ", which has no optimizer state",
    "use_vllm": ": vLLM draws answers from a random state of its own, which is in no checkpoint",
}  # of TRL: what no checkpoint brings back


def refuse_inexact_resume(
    checkpoint: Path, recorded: dict[str, Any], current: dict[str, Any], settings: Settings
) -> None:
    """ConfigError where going on from `checkpoint` would not give what the run would have given without a stop."""
    anew = "start anew with resume=never, or in another hydra.run.dir"
    for key, reason in INEXACT.items():
        if settings.trl.get(key):
            raise ConfigError(f"trl.{key}=true cannot be resumed from {checkpoint}{reason}; {anew}")
    if differing := describe_difference(recorded, current):
        raise ConfigError(f"{checkpoint} cannot be resumed exactly ({differing}): make it as it was, or {anew}")
