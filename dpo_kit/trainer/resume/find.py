"""Going on with a run: from which checkpoint, with which record, or why not."""

import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dpo_kit.config.identity import origin
from dpo_kit.config.settings import Settings
from dpo_kit.errors import ConfigError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.processes import is_writer
from dpo_kit.run.words import override
from dpo_kit.trainer.resume.whole_or_absent import RECORD

log = logging.getLogger(__name__)


def find_checkpoint(settings: Settings, run: RunDirectory, manifest: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from: the newest whole one, or the one that `resume` names; None where there is none.

    Broken ones are set aside under another name. Raises ConfigError where going on would not be exact.
    """
    if settings.resume == "never" or (settings.resume == "auto" and not run.checkpoints.exists()):
        return None
    from dpo_kit.trainer.resume import verified

    if settings.resume == "auto":
        found = verified.newest_verified(run.checkpoints, writer=is_writer())
    else:
        found = Path(settings.resume)
        if not found.is_dir():
            raise ConfigError(f"resume must be auto, never or a checkpoint folder, got {found}, which does not exist")
        if fault := verified.find_fault(found):
            verified.refuse_foreign(found)
            raise ConfigError(f"resume={found} is broken ({fault}): take another one, or resume=auto")
    if found is not None:
        verified.refuse_inexact_resume(found, verified.read_facts(found)["origin"], origin(manifest), settings)
        log.info("resuming from %s", found)
    return found


def begin_from(run: RunDirectory, checkpoint: Path | None) -> None:
    """Bring the run directory to the state it had at `checkpoint`; None: before the first step.

    Later checkpoints, which the run will write again, are put by under another name.
    """
    if not is_writer():
        return
    if run.checkpoints.exists():
        from dpo_kit.trainer.resume.verified import put_by_later, read_facts

        put_by_later(run.checkpoints, read_facts(checkpoint)["step"] if checkpoint else 0)
    for path in run.record().values():
        if path != run.wandb_file:
            path.unlink(missing_ok=True)
    if checkpoint:
        shutil.copytree(checkpoint / RECORD, run.root, dirs_exist_ok=True)


def how_to_go_on(run: RunDirectory, command: str | None) -> str:
    """What to type in order to go on with a run that was stopped."""
    if command is None:
        return f"call train with the same config and run_dir={str(run.root)!r} again"
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return "the command of the sweep again"
    words = shlex.split(command)
    if not any(word.startswith("hydra.run.dir=") for word in words):
        words.append(override("hydra.run.dir", run.root))
    return shlex.join(words)
