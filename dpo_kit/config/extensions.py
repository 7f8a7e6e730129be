"""What a user's own module adds to a run: measures (`callbacks.metrics`, `callbacks.sample_metrics`), callbacks
(`callbacks.extra`).

A module is found in the folder of the command and in PYTHONPATH. What cannot work is refused while the config is
checked, so before anything is loaded; only there, and only where a module is named, is it imported.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_kit.config.settings import Callbacks
from dpo_kit.errors import ConfigError, TrainingError, did_you_mean
from dpo_kit.run.history import plain
from dpo_kit.run.quiet import quiet_imports


def own_faults(callbacks: Callbacks) -> Iterator[str]:
    """Why what `callbacks` names could not be called, key by key."""
    for key, given in (("metrics", ("rows", "scores")), ("sample_metrics", ("prompts", "answers"))):
        for name, path in getattr(callbacks, key).items():
            try:
                inspect.signature(find(path, f"callbacks.{key}.{name}")).bind(*given)
            except ConfigError as error:
                yield str(error)
            except (TypeError, ValueError):
                yield f"callbacks.{key}.{name}={path} must be a function of {' and '.join(given)}"
    for name in sorted(callbacks.metrics.keys() & callbacks.sample_metrics.keys()):
        yield f"callbacks.sample_metrics.{name} and callbacks.metrics.{name} would share one key: rename one"
    if callbacks.sample_metrics and not callbacks.kl_drift:
        yield "callbacks.sample_metrics measures the samples that callbacks.kl_drift=true draws, and it is false"
    for index, options in enumerate(callbacks.extra):
        key, path = f"callbacks.extra[{index}]", options.get("_target_")
        if not isinstance(path, str):
            yield f"{key} needs _target_, the class to make: {{_target_: my_module.MyCallback}}, got {options}"
            continue
        try:
            callback = find(path, f"{key}._target_")
            from transformers import TrainerCallback

            if isinstance(callback, type) and issubclass(callback, TrainerCallback):
                inspect.signature(callback).bind(**{name: options[name] for name in options if name != "_target_"})
            else:
                yield f"{key}._target_={path} must be a subclass of transformers.TrainerCallback"
        except ConfigError as error:
            yield str(error)
        except TypeError as error:
            yield f"{key}: {path}{inspect.signature(callback)} does not fit: {error}"


def find(path: str, key: str) -> Any:
    """The object at `path` (module.name); ConfigError names `key`, what is missing and the near miss."""
    quiet_imports()  # of whatever the module imports
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key} must be module.name, got {path}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(no_module(f"{key}={path}", str(error.name))) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}={path}: {module_name} cannot be imported ({reason})") from error
    if not callable(getattr(module, name, None)):
        meant = did_you_mean(name, (name for name, value in vars(module).items() if callable(value)))
        raise ConfigError(f"{key}={path}: {module_name} has no function or class {name}{meant}")
    return getattr(module, name)


def find_gold(path: str, key: str, needed: Sequence[str]) -> Any:
    """The module at `path` that knows the truth. ConfigError names `key` where it is not there, or what it lacks."""
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        remedy = "name a module on the Python path, as dpo_kit.toy is"
        raise ConfigError(f"{key}={path} cannot be imported: {error}; {remedy}") from error
    if missing := [name for name in needed if not hasattr(module, name)]:
        raise ConfigError(f"{key}={path} lacks {', '.join(missing)}: define it there, as dpo_kit.toy does")
    return module


def no_module(typed: str, missing: str) -> str:
    """What is said of a module that `typed` names and that is not there."""
    meant = did_you_mean(missing, (module.name for module in pkgutil.iter_modules()))
    return f"{typed}: there is no module {missing} in the folder of the command or in PYTHONPATH{meant}"


def call_metrics(paths: Mapping[str, str], *given: Any) -> dict[str, float]:
    """{custom/name: value} of each function of `paths`, called with `given`. TrainingError where it is no number."""
    values = {}
    for name, path in paths.items():
        value = plain(find(path, f"custom/{name}")(*given))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TrainingError(f"custom/{name}: {path} must return a number, got {value!r}")
        values[f"custom/{name}"] = float(value)
    return values
