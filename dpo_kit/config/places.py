"""The files, folders and modules that a config names, looked at before anything is loaded or written. No torch."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from dpo_kit.config.data_files import KNOWN, ON_HUB, ending, match, near_miss
from dpo_kit.config.settings import Data, Model, Settings
from dpo_kit.errors import ConfigError

LISTS = ("deepspeed", "fsdp_config", "accelerator_config")  # of TRL's fields: a dict, or a JSON file with one


def refuse_missing(settings: Settings) -> None:
    """ConfigError for each place that `settings` name and that is not there, or is no place of its kind."""
    faults = [*data_faults(settings.data), *model_faults(settings.model), *judge_faults(settings.judge)]
    faults += module_faults("data.gold", settings.data.gold)
    for name in LISTS:
        value = settings.trl.get(name)
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            faults += file_faults(f"trl.{name}", value)
    resume = settings.resume
    if resume not in ("auto", "never") and not locate("resume", resume).is_dir():
        rule = "resume must be auto, never or a checkpoint folder"
        faults.append(f"{rule}, got {resume}, which does not exist{near_miss(resume)}")
    if faults:
        raise ConfigError("\n".join(faults))


def data_faults(data: Data) -> Iterator[str]:
    """Sources of rows that are not there or cannot be read; a hub id is left to the hub."""
    for key, named in (("data.train", data.train), ("data.eval", data.eval), ("data.benchmark", data.benchmark)):
        for path in [named] if isinstance(named, str) else [source.path for source in named or ()]:
            yield from rows_faults(key, path)


def rows_faults(key: str, path: str) -> Iterator[str]:
    """Why there can be no rows at `path`: a file, a folder with some, or a pattern; a hub id is left to the hub."""
    local = locate(key, path)
    if local.is_dir():
        if not any(ending(file) for file in local.rglob("*")):
            yield f"{key}={path} has no {', '.join(KNOWN)} file in it"
    elif local.exists() or ((local.suffix or not ON_HUB.fullmatch(path)) and not match(path)):
        yield from file_faults(key, path)
        if local.exists() and not ending(local):
            yield f"{key}={path}: unknown kind of file; known are {', '.join(KNOWN)}"


def model_faults(model: Model) -> Iterator[str]:
    """Models that are meant to be local and are not there, or hold none; a template that is in no file."""
    for key, path in (("model.path", model.path), ("model.reference", model.reference)):
        yield from weights_faults(key, path or "")
    if model.chat_template and "{" not in model.chat_template:
        yield from file_faults("model.chat_template", model.chat_template)


def weights_faults(key: str, path: str) -> Iterator[str]:
    """Why there can be no model at `path`; a hub id is left to the hub."""
    local = locate(key, path)
    if path and local.is_file():
        yield f"{key}={path} is a file, not a folder with a model: name the folder above it, {key}={local.parent}"
    elif path and not local.exists() and not ON_HUB.fullmatch(path):
        yield f"{key}={path} does not exist{near_miss(path)}"


def module_faults(key: str, name: str | None) -> Iterator[str]:
    """Why there is no module `name`."""
    try:
        missing = "" if not name or importlib.util.find_spec(name) else name
    except ModuleNotFoundError as error:
        missing = str(error.name)
    except (ImportError, ValueError) as error:
        missing = f"{name} ({error})"
    if missing:
        from dpo_kit.config.extensions import no_module

        yield no_module(f"{key}={name}", missing)


def judge_faults(judge: Any) -> Iterator[str]:
    """A judge's model, module or rubric that is not there."""
    yield from weights_faults("judge.path", getattr(judge, "path", ""))
    yield from module_faults("judge.module", getattr(judge, "module", None))
    if rubric := getattr(judge, "rubric", None):
        yield from file_faults("judge.rubric", rubric)


def file_faults(key: str, path: str) -> Iterator[str]:
    """Why the file at `path` cannot be read."""
    local = locate(key, path)
    if not local.exists():
        yield f"{key}={path}: no such file or folder{near_miss(path)}"
    elif not local.is_file():
        yield f"{key}={path} is a folder: name a file in it"
    elif not os.access(local, os.R_OK):
        yield f"{key}={path} cannot be read by this user: chmod u+r, or name a copy"


def locate(key: str, path: str | Path) -> Path:
    """`path`, given as `key`, with ~ as the home folder. ConfigError where this machine can have no such place."""
    try:
        place = Path(path).expanduser()
        place.exists()
    except (OSError, RuntimeError, TypeError) as error:  # a name that is too long, the home of nobody, a list
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key}={str(path)[:80]} can be no place on this machine: {reason}") from error
    return place


# --- where something is written ----------------------------------------------------------------------------------


def refuse_unwritable(key: str, folder: str | Path) -> None:
    """ConfigError where `folder`, given as `key`, is a file or cannot be made or written to."""
    path = locate(key, folder).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{key}={folder}: {nearest} is a file, not a folder: choose another {key}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder} cannot be written ({nearest} is read-only here): choose another {key}")


def claim(folder: Path) -> Path:
    """`folder` made anew, or beside it one with a number behind its name, where another start has taken it."""
    for number in count(1):
        mine = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            mine.mkdir(parents=True)
            break
    return mine
