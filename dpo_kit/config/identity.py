"""When two starts are the same run: the part of the config that counts. No torch."""

from collections.abc import Iterable
from typing import Any

from dpo_kit.config.settings import COST_ONLY, Settings
from dpo_kit.errors import ConfigError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import digest, read_json
from dpo_kit.run.redact import redact


def comparable(settings: Settings) -> dict[str, Any]:
    """The resolved config without what may differ between two starts of one run."""
    left_out: Any = dict.fromkeys(("resume", "dry_run", "tracking", "choose"), True)
    left_out["data"] = {"benchmark", "reference_margin"}  # they change the data report, not the run
    left_out["judge"] = True if settings.judge is None else set(COST_ONLY)  # what it costs can be raised meanwhile
    return redact(settings.model_dump(mode="json", exclude=left_out))


def refuse_other_run(run: RunDirectory, settings: Settings, key: str = "hydra.run.dir") -> None:
    """ConfigError where the directory already holds a run of another config; names the keys that differ."""
    if not run.manifest.exists():
        return
    if differing := describe_difference(read_json(run.manifest)["config"], comparable(settings)):
        raise ConfigError(f"{run.root} holds a run of another config ({differing}): choose another {key}")


NUMERIC = ("python", "torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes")
PLACE = ("processor", "device", "world_size", "mixed_precision")


def origin(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's manifest on which every bit of its outcome depends; it travels with each checkpoint."""
    return {
        "config": manifest["config"],
        "data": {name: split["sha256"] for name, split in manifest["data"].items()},
        "model": manifest["model"],
        "versions": {name: manifest["versions"][name] for name in NUMERIC},
        "machine": {name: manifest["machine"].get(name) for name in PLACE},
    }


def describe_difference(recorded: Any, current: Any) -> str:
    """The keys in which two trees differ, with both values; empty where they are equal."""
    differing = list_differences(recorded, current)
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return ", ".join(differing[:5]) + more


def list_differences(recorded: Any, current: Any) -> list[str]:
    """Each key in which two trees differ, with both values."""
    old, new = flatten(recorded), flatten(current)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)} there, {new.get(key)} now" for key in differing]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested dicts."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, item in tree.items() for key, value in flatten(item, f"{prefix}{name}.").items()}


def sweep_id(configs: Iterable[Any]) -> str:
    """8 hex digits of the jobs' comparable configs, whatever their order."""
    return digest(sorted(digest(config) for config in configs))[:8]
