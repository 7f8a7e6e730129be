"""Where a model comes from, and what is refused unloaded: unfinished runs, code, pickles.

Nothing of a repository is executed: weights are safetensors, code runs only from a repository at a commit that the
config names (`model.trust_remote_code` with `model.revision`, see config/compose.py).
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dpo_kit.config.places import refuse_missing
from dpo_kit.config.settings import Model, Settings
from dpo_kit.errors import ModelError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.redact import redact_text

ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def refuse_unsafe(key: str, path: str, revision: str | None = None) -> None:
    """ModelError where `path` (a folder or hub id, given as `key`) is pickled or asks for foreign code."""
    _refuse_pickles(key, Path(path).expanduser())
    config = read_file(path, "config.json", revision)
    kernel = str(config.get("attn_implementation") or config.get("_attn_implementation") or "")
    if "/" in kernel:
        raise ModelError(
            f"{key}={path}: its config.json wants attention code from {kernel}, which would be downloaded and run: "
            "take that line out of config.json and set model.attn_implementation=sdpa"
        )
    mapped = (config.get("auto_map") or {}).values()  # file.Class, or other/repository--file.Class
    code = [str(each) for value in mapped for each in (value if isinstance(value, list) else [value])]
    if foreign := sorted({each.split("--")[0] for each in code if "--" in each} - {path}):
        raise ModelError(
            f"{key}={path}: its code lies in another repository, {foreign[0]}, whose commit cannot be named here: load "
            "it from there, with model.revision"
        )
    if secret := next((name for name, text in _texts(config) if redact_text(text) != text), None):
        raise ModelError(
            f"{key}={path}: {secret} in its config.json looks like a secret, and would be saved with every checkpoint "
            "and with the tuned model: take it out"
        )


def find_parent(key: str, path: str) -> dict[str, Any] | None:
    """The finished run whose policy `path` is (run, method, beta, seed, config_hash), or None where it is no run's.

    ModelError for a run that has not ended well, for a checkpoint and for a run directory itself: what was meant is
    named.
    """
    folder = Path(path).expanduser().resolve()
    if RunDirectory(folder).manifest.exists() and not (folder / "config.json").exists():
        raise ModelError(f"{key}={path} is a run directory; did you mean its policy, {key}={Path(path) / 'model'}?")
    if folder.parent.name == "checkpoints" and RunDirectory(above := folder.parents[1]).manifest.exists():
        raise ModelError(
            f"{key}={path} is a checkpoint in the middle of the run {above}: go on with that run (its command, with "
            f"hydra.run.dir={above}), or start from its end, {key}={above / 'model'}. If this checkpoint is meant as a "
            "start, copy its folder out of the run first"
        )
    run = RunDirectory(folder.parent)
    if folder.name != run.model.name or not run.manifest.exists():
        return None
    result, manifest = run.read_result() or {"status": "running or killed"}, read_json(run.manifest)
    if result["status"] != "done":
        raise ModelError(
            f"{key}={path} belongs to a run that has not ended well (status: {result['status']}): finish it with "
            f"hydra.run.dir={run.root}, or name another model"
        )
    return {name: result[name] for name in ("method", "beta", "seed", "model")} | {
        "run": str(run.root),
        "config_hash": manifest["config_hash"],
    }


@dataclass(frozen=True)
class Start:
    """What training of `model` starts from: `base`, a whole model, and on it the `adapter` that training goes on from
    (what its adapter_config.json says), or None.
    """

    model: Model
    base: Model
    adapter: dict[str, Any] | None


def find_start(model: Model) -> Start:
    """What `model` starts from. ModelError for an adapter that cannot be gone on with."""
    if not (adapter := read_file(model.path, ADAPTER, model.revision)):
        return Start(model, model, None)
    from dpo_kit.model.adapter_origin import base_of

    return Start(model, base_of(model, adapter), adapter)


def has_tokenizer(path: str, revision: str | None) -> bool:
    """Whether `path` brings a tokenizer of its own, as adapters of a trainer do."""
    return bool(read_file(path, "tokenizer_config.json", revision))


def quantised_by(path: str, revision: str | None) -> str | None:
    """The method by which the weights at `path` are published quantised; None where they are not."""
    return (read_file(path, "config.json", revision).get("quantization_config") or {}).get("quant_method")


def _refuse_pickles(key: str, folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise ModelError(
            f"{key}={folder} has its weights in {pickles[0]}, a pickle, which can run any code when it is read; only "
            "safetensors are loaded. If you trust whoever made it: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained('converted')"
        )


def read_file(path: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a folder or repository; empty where it is not to be had (loading will say what is missing)."""
    try:
        return read_json(found) if (found := find_file(path, name, revision)) else {}
    except ValueError as error:
        raise ModelError(f"{Path(path).expanduser() / name} is not JSON: {error}; copy the model again") from error


def find_file(path: str, name: str, revision: str | None) -> Path | None:
    file = Path(path).expanduser() / name
    return (file if file.exists() else None) if file.parent.is_dir() else _download(path, name, revision)


@lru_cache
def _download(repository: str, name: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(repository, name, revision=revision)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _texts(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Every string of nested containers with the key above it; commits and paths are left out."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((name, item) for item in value)
        return [pair for key, item in items for pair in _texts(item, str(key))]
    return [(name, value)] if isinstance(value, str) and not name.endswith(("hash", "_path", "version")) else []


def refuse_start(model: Model) -> None:
    """ModelError for local folders from which no training starts: of unfinished runs, pickles, no models at all."""
    for key, path in (("model.path", model.path), ("model.reference", model.reference)):
        folder = Path(path or "").expanduser()
        if not path or not folder.is_dir():
            continue
        find_parent(key, path)
        refuse_unsafe(key, path)
        if not any((folder / name).exists() for name in ("config.json", ADAPTER)):
            raise ModelError(f"{key}={path} has no config.json: a model is a folder with that and safetensors weights")
        if key == "model.path" and (start := find_start(model)).adapter:
            from dpo_kit.model.adapter_origin import refuse_adapter_weights

            refuse_adapter_weights(start)


def refuse_unusable(settings: Settings) -> None:
    """ConfigError or ModelError for places in `settings` that are not there, or from which no training starts."""
    refuse_missing(settings)
    refuse_start(settings.model)
