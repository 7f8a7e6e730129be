"""What a run was made of: versions, config, data, weights; written before training, so that a failed run tells too."""

import platform
import shlex
import subprocess
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dpo_kit.config.compose import own_folders
from dpo_kit.config.identity import comparable
from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Prepared, Rows
from dpo_kit.model.hardware import device_name, weight_dtype
from dpo_kit.model.origin import Start, find_parent, find_start
from dpo_kit.model.template import stop_clock, template_hash, writes_date
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import digest, hash_weights, read_json
from dpo_kit.run.processes import launcher, world_size
from dpo_kit.run.redact import redact_argv
from dpo_kit.trainer.arguments import asked_of_accelerate, effective_batch

PACKAGES = "dpo-kit trl transformers torch datasets accelerate peft bitsandbytes hydra-core wandb"
ADAPTER = ("r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora")  # of its options
CONTENT = ("pair_id", "prompt", "chosen", "rejected", "completion", "label")


def typed_command() -> str | None:
    """What was typed to start this run, secrets redacted; None from Python."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    own = own_folders(hydra.runtime.config_sources)
    words = [word for word in hydra.overrides.task if not word.startswith("beta-sweep=")]  # of this run only
    return shlex.join([*(launcher() or ["python"]), "-m", "dpo_kit", *redact_argv([*own, *words])])


def sweep_folder() -> Path | None:
    """The folder of the sweep that this run belongs to; None outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir)


def keep_date(run: RunDirectory, tokenizer: Any) -> str | None:
    """The moment that a template which writes the date is given in this run, on whatever day it is started again or
    measured; from now on it is given that one. None where the template writes none.
    """
    if not writes_date(tokenizer):
        return None
    there = read_json(run.manifest).get("template_date") if run.manifest.exists() else None
    moment = datetime.fromisoformat(there) if there else datetime.now()
    stop_clock(tokenizer, moment)
    return moment.isoformat()


def chosen_amount(run: RunDirectory) -> dict[str, int] | None:
    """What an earlier start of `run` has chosen to measure (see budget.py); None where there was none."""
    return read_json(run.manifest).get("measuring") if run.manifest.exists() else None


def build_manifest(
    settings: Settings,
    data: Prepared,
    command: str | None,
    tokenizer: Any,
    date: str | None = None,
    measuring: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The facts of a run that do not change while it trains; secrets redacted. `date`: see `keep_date`; `measuring`:
    see `chosen_amount`.
    """
    config = comparable(settings)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "template_date": date,
        "command": command,
        "folder": str(Path.cwd()),  # what relative paths of the config start from
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES.split()}},
        "git": git_state(),
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "device": device_name(),
            "world_size": world_size(),
            "dtype": str(weight_dtype(settings.model.dtype, settings.model.tuning)).removeprefix("torch."),
            "mixed_precision": asked_of_accelerate(settings.trl),
        },
        "config": config,
        "config_hash": digest(config),
        "effective_batch": effective_batch(settings.trl),
        "choose": settings.choose.model_dump(),
        "measuring": measuring,
        "data": {
            name: {"rows": len(rows), "sha256": digest(contents(rows))}
            for name, rows in (("train", data.train), ("select", data.select), ("test", data.test))
        },
        "model": describe_start(find_start(settings.model), tokenizer),
    }


def describe_start(start: Start, tokenizer: Any) -> dict[str, Any]:
    """Which weights, template and code training starts from, and which run they come from where they are a run's; of an
    adapter that training goes on from its base, its options, and what it is measured against.
    """
    model, base = start.model, start.base
    described = {
        "path": model.path,
        "revision": model.revision,
        "sha256": hash_weights(model.path),
        "chat_template_sha256": template_hash(tokenizer),
        "remote_code": {"repository": model.path, "commit": model.revision} if model.trust_remote_code else None,
        "parent": find_parent("model.path", model.path),
    }
    if model.reference:
        described["reference_parent"] = find_parent("model.reference", model.reference)
    if start.adapter:
        weights = {"base": base.path, "base_revision": base.revision, "base_sha256": hash_weights(base.path)}
        options = {name: start.adapter.get(name) for name in ADAPTER}
        against = model.reference or "the adapter as it started, on its base"
        described["adapter"] = weights | options | {"reference": against}
    return described


def contents(rows: Rows) -> list[dict[str, Any]]:
    """What of `rows` is trained on or measured with."""
    return [{name: row[name] for name in CONTENT if name in row} for row in rows]


def git_state() -> str | None:
    """The commit of the working directory, with `+changes` where files differ; None outside a repository."""
    try:
        run = [
            subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run[0].stdout.strip() + ("+changes" if run[1].stdout.strip() else "") if run[0].returncode == 0 else None
