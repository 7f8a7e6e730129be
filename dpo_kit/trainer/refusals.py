"""What a library raises of its own, told with the keys that were typed; its traceback is in the log."""

import contextlib
import errno
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig

from dpo_kit.errors import ConfigError, DpoKitError, TrainingError
from dpo_kit.run.redact import redact_argv


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """What `what` raises of its own, as a ConfigError with the keys that were typed: it refuses what they say."""
    try:
        yield
    except (DpoKitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{what} refuse {blamed(error)}") from error


def explain_stop(error: Exception, step: int, folder: Path) -> Exception:
    """What stopped training in a library, with the keys that may be the cause, or what to do where memory or the disk
    of `folder` is full; any other error of the system as it is.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return TrainingError(
            f"out of memory at step {step + 1}: take speed.checkpointing=true, fewer rows at a time "
            "(trl.per_device_train_batch_size, and as many times more trl.gradient_accumulation_steps), or "
            "model.tuning=lora"
        )
    if isinstance(error, OSError):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        free = shutil.disk_usage(folder).free / 1e9
        return TrainingError(
            f"{folder} cannot be written ({error}); {free:.2f} GB are free on its disk. The last checkpoint is as it "
            "was: make room, and the same command goes on from there"
        )
    when = f"at step {step + 1}" if step else "before its first step"
    return TrainingError(f"training stopped {when}; typed: {blamed(error)}")


def blamed(error: Exception) -> str:
    """The overrides that `error` may be about, all where it names none, and what it says; its traceback goes to the log
    of the run alone, and where that is stands behind.
    """
    logging.getLogger("traceback").warning("%s", error, exc_info=error)
    text = f"{type(error).__name__}: {str(error).strip()}"
    typed, words = typed_words(), re.compile(r"\w{4,}").findall
    named = [word for word in typed if {*words(word)} & {*words(text)}]
    told = f"{' '.join(redact_argv(named or typed)) or 'this config'}: {text}"
    if not HydraConfig.initialized():
        return told
    hydra = HydraConfig.get()
    return f"{told} (traceback: {Path(hydra.runtime.output_dir) / hydra.job.name}.log)"


def typed_words() -> list[str]:
    """The overrides of this run that were typed; none from Python."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
