"""The config of a run that was, from its manifest. No torch."""

import copy
from pathlib import Path
from typing import Any

from dpo_kit.config.data_files import match
from dpo_kit.config.settings import Choose, Settings, Tracking
from dpo_kit.errors import ModelError

OF_MODEL, OF_DATA = ("path", "reference", "chat_template"), ("train", "eval", "benchmark")  # what may name files


def recall_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """The config of the run that wrote `manifest`; a relative path is one from the folder that the run was started in,
    where it is there. ModelError where the model that training started from is gone.
    """
    config, started_in = copy.deepcopy(manifest["config"]), Path(manifest.get("folder") or ".")
    model, data = config.get("model") or {}, config.get("data") or {}
    named = [(block, key) for block, keys in ((model, OF_MODEL), (data, OF_DATA)) for key in keys]
    for rows in (data.get("train"), data.get("eval")):
        named += [(source, "path") for source in rows] if isinstance(rows, list) else []
    for block, key in named:
        path = block.get(key)
        if not isinstance(path, str) or (key == "chat_template" and "{" in path):  # the template itself, no file
            continue
        beside = started_in / Path(path).expanduser()
        if beside.exists() or match(str(beside)):
            block[key] = str(beside)
    path = model.get("path", "")
    if (manifest.get("model") or {}).get("sha256") and not Path(path).expanduser().exists():
        gone = f"model.path={path} is not there any more"
        raise ModelError(f"{gone} (the run was started in {started_in}): bring it back")
    return config


def recall_settings(manifest: dict[str, Any]) -> Settings:
    """The settings of the run that wrote `manifest`; what does not belong to a run's identity is as if unset."""
    silent = Tracking(reporter="none", project="", entity=None, group=None, tags=[], name="")
    return Settings(**recall_config(manifest), resume="never", tracking=silent, choose=Choose())
