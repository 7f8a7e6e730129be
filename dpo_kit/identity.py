"""When two starts are the same run: the part of the config that counts, without importing torch or trl."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_kit.data.rows import digest
from dpo_kit.errors import ConfigError
from dpo_kit.run import RunDirectory, read_json
from dpo_kit.secrets import redact
from dpo_kit.settings import Settings


def comparable(settings: Settings) -> dict[str, Any]:
    """The resolved config without what may differ between two starts of one run."""
    reported = {"benchmark": True, "reference_margin": True}  # they change the data report, not the run
    left_out: Any = {"resume": True, "tracking": True, "choose": True, "data": reported}
    return redact(settings.model_dump(mode="json", exclude=left_out))


def refuse_other_run(run: RunDirectory, settings: Settings) -> None:
    """ConfigError where the directory already holds a run of another config; names the keys that differ."""
    if not run.manifest.exists():
        return
    there, here = _flat(read_json(run.manifest)["config"]), _flat(comparable(settings))
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if differing:
        shown = ", ".join(f"{key}: {there.get(key)} there, {here.get(key)} now" for key in differing[:5])
        raise ConfigError(f"{run.root} holds a run of another config ({shown}): choose another hydra.run.dir")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, item in tree.items() for key, value in _flat(item, f"{prefix}{name}.").items()}


def sweep_id(configs: Iterable[Any]) -> str:
    """8 hex digits of the jobs' comparable configs, whatever their order."""
    return digest(sorted(digest(config) for config in configs))[:8]
