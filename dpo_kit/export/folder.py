"""A run's policy as a plain transformers folder: complete or absent, checked from its own files."""

from __future__ import annotations

import gc
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dpo_kit.config.identity import recall_config
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.export.merge import (
    choose_dtype,
    compare,
    load_plain,
    merge,
    prompt_logits,
    quantised_logits,
    refuse_other,
    refuse_other_base,
)
from dpo_kit.export.serving import find_faults, has_chat_template
from dpo_kit.model.load import end_as_trained
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json, write_text
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.run.report.card import card_text
from dpo_kit.trainer.resume.checkpoints import SAVING, put_in_place

log = logging.getLogger(__name__)
FACTS = "export.json"
FAR = 0.02  # nats a token: more than 4-bit rounding costs a model of some billion parameters
HOW = {
    "full": "All weights were tuned.",
    "lora": "The LoRA adapter is merged into its base.",
    "original": "The adapter, trained on a 4-bit base, is merged into the base as published: the policy's answers "
    "differ from those measured in training by what the 4-bit rounding had changed in the base.",
    "dequantised": "The adapter is merged into the 4-bit base that it was trained on, dequantised: the policy that was "
    "measured, with the rounding of its base kept.",
}


@dataclass(frozen=True)
class Export:
    """What was asked for."""

    run: RunDirectory
    out: Path
    dtype: str = "auto"
    base: str = "original"


def export_run(wanted: Export) -> dict[str, Any]:
    """Write `wanted.out` and return its export.json; one that is there already, and is the same, is left as it is.

    ConfigError where the run has not ended well or `out` holds something else; ModelError where the folder would not
    be the policy that the run left.
    """
    manifest, result = finished(wanted.run)
    model = Model(**recall_config(manifest)["model"])
    quiet_libraries()
    dtype = choose_dtype(model, wanted.run, wanted.dtype)
    asked = {
        "config_hash": manifest["config_hash"],
        "dtype": dtype,
        "base": wanted.base if model.tuning == "qlora" else None,
    }
    if there := _already_there(wanted.out, asked):
        return there
    refuse_other_base(model, manifest)
    aside = wanted.out.with_name(f"{SAVING}-{wanted.out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        facts = asked | _write(wanted, model, dtype, aside)
        evaluated = wanted.run.evaluation / "result.json"
        judged = read_json(evaluated) if evaluated.exists() else None
        write_text(aside / "README.md", card_text(result, manifest, judged, facts))
        write_json(aside / FACTS, facts)
        put_in_place(aside, wanted.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return facts


def finished(run: RunDirectory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and result of a run that has ended well; ConfigError for any other folder."""
    if not run.manifest.exists():
        inside = RunDirectory(run.root.parent).manifest.exists()
        meant = f"; did you mean run={run.root.parent}?" if inside else ": name the folder that holds manifest.json"
        raise ConfigError(f"run={run.root} is no run directory{meant}")
    result = run.read_result() or {"status": "running or killed"}
    if result["status"] != "done":
        raise ConfigError(f"run={run.root} has not ended well (status: {result['status']}): finish it first")
    return read_json(run.manifest), result


def push(out: Path, repository: str, *, private: bool) -> str:
    """Upload `out` to `repository` on the hub, made where it is not there; its address. ConfigError where refused."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=out, commit_message="Export of dpo_kit")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"push={repository}: the hub refuses it ({reason}); run `hf auth login`; the folder is {out}"
        ) from error
    return str(made)


def _already_there(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    there = read_json(out / FACTS) if (out / FACTS).exists() else {}
    if {name: there.get(name) for name in asked} == asked:
        log.info("%s is there already", out)
        return there
    raise ConfigError(f"out={out} holds something else: choose another folder, or delete that one")


def _write(wanted: Export, model: Model, dtype: str, aside: Path) -> dict[str, Any]:
    """The files of the export in `aside`, compared with the policy; what export.json says of them."""
    tokenizer = AutoTokenizer.from_pretrained(wanted.run.model)
    for how_loaded in ("is_local", "local_files_only"):  # transformers would save these, true on this machine only
        tokenizer.init_kwargs.pop(how_loaded, None)
    policy, before = merge(model, wanted.run, tokenizer, wanted.base)
    _complete_configs(policy, tokenizer)
    try:
        policy.to(getattr(torch, dtype)).save_pretrained(aside)
    except ValueError as error:  # transformers refuses to write a generation config that contradicts itself
        raise ModelError(f"the base's generation config cannot be saved: {error}") from error
    tokenizer.save_pretrained(aside)
    del policy
    gc.collect()
    if faults := find_faults(aside):
        raise ModelError(f"the export would not be served right: {'; '.join(faults)}")
    if not has_chat_template(aside):
        log.warning("the tokenizer has no chat template: servers can complete text with this model, but not chat")
    difference = compare(before, prompt_logits(load_plain(aside), tokenizer))
    refuse_other("writing the export", difference, dtype)
    how = {"how": HOW[wanted.base if model.tuning == "qlora" else model.tuning], "checked": difference.describe()}
    if model.tuning == "qlora":
        trained = compare(quantised_logits(model, wanted.run, tokenizer), before)
        how["checked"] += f"; against the policy as trained in 4 bit, KL {trained.kl:.1e} nats a token"
        if trained.kl > FAR:
            log.warning(
                "the export is %.2f nats a token from the policy that was trained and measured in 4 bit, since the "
                "base is not rounded any more: measure it again, or take base=dequantised",
                trained.kl,
            )
    return how | {"logits": difference.logits, "kl": difference.kl, "greedy": difference.greedy}


def _complete_configs(policy: Any, tokenizer: Any) -> None:
    """Answers end where they ended in training; the cache is used, which training had turned off."""
    policy.config.use_cache = True
    end_as_trained(policy, tokenizer)
    if policy.generation_config.pad_token_id is None:
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
