"""Going on with a run: from which checkpoint, with which record, or why not; and what its trainer does first. Loaded
where an earlier start has left something.

Each checkpoint is read and compared with its manifest; broken ones are set aside.
"""

import hashlib
import logging
import shlex
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from dpo_kit.config.identity import describe_difference, origin
from dpo_kit.config.settings import Settings
from dpo_kit.errors import ConfigError, TrainingError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.processes import is_writer
from dpo_kit.run.words import override
from dpo_kit.trainer.manifest import sweep_folder
from dpo_kit.trainer.resume.carried_state import pick_up
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


def find_checkpoint(settings: Settings, run: RunDirectory, manifest: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from: the newest whole one, or the one that `resume` names; None where there is none.

    Broken ones are set aside under another name. Raises ConfigError where going on would not be exact.
    """
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        found = newest_verified(run.checkpoints, writer=is_writer())
    else:
        found = Path(settings.resume)
        if not found.is_dir():
            raise ConfigError(f"resume must be auto, never or a checkpoint folder, got {found}, which does not exist")
        if fault := find_fault(found):
            refuse_foreign(found)
            raise ConfigError(f"resume={found} is broken ({fault}): take another one, or resume=auto")
    if found is not None:
        refuse_inexact_resume(found, read_facts(found)["origin"], origin(manifest), settings)
        log.info("resuming from %s", found)
    return found


def begin_from(run: RunDirectory, checkpoint: Path | None) -> None:
    """Bring the run directory to the state it had at `checkpoint`; None: before the first step.

    Later checkpoints, which the run will write again, are put by under another name; how an earlier start ended is
    forgotten: without a result a run is running, or was killed.
    """
    if not is_writer():
        return
    run.result.unlink(missing_ok=True)
    put_by_later(run.checkpoints, read_facts(checkpoint)["step"] if checkpoint else 0)
    for path in run.record().values():
        if path != run.wandb_file:
            path.unlink(missing_ok=True)
    if checkpoint:
        shutil.copytree(checkpoint / RECORD, run.root, dirs_exist_ok=True)


def catch_up(trainer: Any, resumed: dict[str, Any], given: tuple[Any, ...]) -> None:
    """Let `trainer` (Safekeeping) carry on as if it had never been stopped, first with what was still to be done at
    that step. `resumed` is what it has kept; `given`: model, trial, epoch, ignored keys, time. TrainingError where the
    best checkpoint so far is gone, and the run is to end with it.
    """
    due, checkpoint = resumed["due"], Path(trainer._checkpoint)
    best = read_json(checkpoint / "trainer_state.json")["best_model_checkpoint"]
    if best is not None:
        # where this run's checkpoints lie now: in a run directory that was moved transformers forgets it
        # (huggingface/transformers#48315)
        here = Path(trainer._get_output_dir(None)) / Path(best).name
        if trainer.args.load_best_model_at_end and not here.is_dir():
            raise TrainingError(
                f"the best checkpoint so far, {here}, is gone, and trl.load_best_model_at_end=true ends with it: "
                "bring it back, or start anew with resume=never"
            )
        trainer.state.best_model_checkpoint = str(here)
    trainer._load_rng_state(trainer._checkpoint)
    pick_up(trainer, resumed["carried"])
    trainer._boundary = None if due["epoch_end"] else trainer.state.global_step
    given = (due["grad_norm"], *given)
    if due["evaluate"]:
        trainer.control.should_evaluate, trainer.control.should_save = True, due["save"]
        trainer._maybe_log_save_evaluate(trainer._tr_loss, *given)
    trainer._boundary = trainer.state.global_step
    if due["epoch_end"]:
        trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
        trainer._maybe_log_save_evaluate(trainer._tr_loss, *given, learning_rate=due["learning_rate"])
    trainer.control.should_training_stop |= due["stop"]


def how_to_go_on(run: RunDirectory, command: str | None) -> str:
    """What to type in order to go on with a run that was stopped."""
    if command is None:
        return f"call train with the same config and run_dir={str(run.root)!r} again"
    if sweep_folder():
        return "the command of the sweep again"
    words = shlex.split(command)
    if not any(word.startswith("hydra.run.dir=") for word in words):
        words.append(override("hydra.run.dir", run.root))
    return shlex.join(words)


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
