"""A run's policy as a plain transformers folder: complete or absent, checked from its own files."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kit.config.recall import recall_config
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.export.merge import (
    DTYPES,
    Distance,
    choose_dtype,
    compare,
    merge,
    read_texts,
    refuse_other,
    refuse_other_base,
    round_weights,
    text_logits,
)
from dpo_kit.model.load import end_as_trained, load_weights
from dpo_kit.model.origin import base_of
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json, write_text
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.run.report.card import card_text
from dpo_kit.trainer.resume.whole_or_absent import SAVING, put_in_place

log = logging.getLogger(__name__)
FACTS = "export.json"
FAR = 0.02  # nats a token: more than rounding costs a model of some billion parameters, to 4 bits even
HOW = {
    "full": "All weights were tuned.",
    "lora": "The LoRA adapter is merged into its base.",
    "original": "The adapter, trained on a 4-bit base, is merged into the base as published: the policy's answers "
    "differ from those measured in training by what the 4-bit rounding had changed in the base.",
    "dequantised": "The adapter is merged into the 4-bit base that it was trained on, dequantised: the policy that was "
    "measured, with the rounding of its base kept.",
}


def export_run(run: RunDirectory, out: Path, dtype: str = "auto", base: str = "original") -> dict[str, Any]:
    """Write `out` and return its export.json; one that is there already, and is the same, is left as it is.

    `base` is what a QLoRA adapter is merged into: the original weights, or the "dequantised" ones it was trained on.
    ConfigError where the run has not ended well or `out` holds something else; ModelError where the folder would not
    be the policy that the run left.
    """
    manifest, result = run.read_finished()
    model = Model(**recall_config(manifest)["model"])
    quiet_libraries()
    dtype = choose_dtype(model, run, dtype)
    is_qlora = model.tuning == "qlora"
    asked = {"config_hash": manifest["config_hash"], "dtype": dtype, "base": base if is_qlora else None}
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        earlier = read_json(out / FACTS) if (out / FACTS).exists() else {}
        if {name: earlier.get(name) for name in asked} != asked:
            raise ConfigError(f"out={out} holds something else: choose another folder, or delete that one")
        log.info("%s is there already", out)
        return earlier
    refuse_other_base(model, manifest)
    with complete_or_absent(out) as aside:
        distance, from_quantised = _write(run, model, dtype, base, aside)
        checked = distance.describe()
        if from_quantised is not None:
            checked += f"; against the policy as trained in 4 bit, KL {from_quantised:.1e} nats a token"
        facts = {**asked, "how": HOW[base if is_qlora else model.tuning], "checked": checked, **asdict(distance)}
        evaluated = run.evaluation / "result.json"
        judged = read_json(evaluated) if evaluated.exists() else None
        write_text(aside / "README.md", card_text(result, manifest, judged, facts))
        write_json(aside / FACTS, facts)
    return facts


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place at the end of the block; gone where that fails."""
    aside = out.with_name(f"{SAVING}-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


def _write(run: RunDirectory, model: Model, dtype: str, base: str, aside: Path) -> tuple[Distance, float | None]:
    """The files of the export in `aside`; how far they are from the policy, and with QLoRA the KL (nats a token) of the
    export from the policy as it was trained in 4 bit.
    """
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    for how_loaded in ("is_local", "local_files_only"):  # transformers would save these, true on this machine only
        tokenizer.init_kwargs.pop(how_loaded, None)
    texts = read_texts(run, tokenizer)
    policy, before = merge(model, run, texts, base)
    policy.config.use_cache = True  # which training had turned off
    end_as_trained(policy, tokenizer)
    if policy.generation_config.pad_token_id is None:
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
    round_weights(policy, getattr(torch, dtype))
    rounded = text_logits(policy, texts)
    try:
        policy.to(getattr(torch, dtype)).save_pretrained(aside)
    except ValueError as error:  # transformers refuses to write a generation config that contradicts itself
        raise ModelError(f"the base's generation config cannot be saved: {error}") from error
    tokenizer.save_pretrained(aside)
    del policy
    gc.collect()
    if faults := find_faults(aside):
        raise ModelError(f"the export would not be served right: {'; '.join(faults)}")
    if not tokenizer.chat_template:
        log.warning("the tokenizer has no chat template: servers can complete text with this model, but not chat")
    plain = AutoModelForCausalLM.from_pretrained(aside, dtype="auto").eval()  # as anybody loads it, without dpo_kit
    distance = compare(before, text_logits(plain, texts))
    refuse_other("writing the export", compare(rounded, text_logits(plain.float(), texts)))
    if not distance.kl <= FAR:
        log.warning(
            "rounding to %s moves the policy by %.2g nats a token: dtype=float32 is exact, at twice the size",
            *(dtype, distance.kl),
        )
    if model.tuning != "qlora":
        return distance, None
    trained = PeftModel.from_pretrained(load_weights(base_of(model)), run.model).eval()  # type: ignore[arg-type]
    kl = compare(text_logits(trained, texts), before).kl
    if kl > FAR:
        log.warning(
            "the export is %.2f nats a token from the policy that was trained and measured in 4 bit, since the "
            "base is not rounded any more: measure it again, or take base=dequantised",
            kl,
        )
    return distance, kl


def find_faults(folder: Path) -> list[str]:
    """Why a server (vLLM, TGI, transformers) would refuse the model in `folder` or would not end its answers; [] where
    it is right. What the weights say is compared apart from this.
    """
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    if missing := [name for name in names if not (folder / name).exists()]:
        return [f"{name} is missing" for name in missing]
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    text = config.get("text_config") or config
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    checks = {
        "config.json names no architectures": not config.get("architectures"),
        f"config.json has dtype {dtype}, not one of {', '.join(DTYPES)}": dtype not in DTYPES,
        "config.json asks for code of a repository (auto_map)": "auto_map" in config,
        "config.json asks for quantisation (quantization_config) of weights that have none": "quantization_config"
        in config,
        "there are no weights in safetensors": not any(folder.glob("*.safetensors")),
    }
    eos, ends = AutoTokenizer.from_pretrained(folder).eos_token_id, generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    for end in ends:
        outside = end is not None and not 0 <= end < text["vocab_size"]
        checks[f"eos_token_id {end} lies outside the vocabulary"] = outside
    run_on = f"generation_config.json does not end at the tokenizer's EOS (id {eos}): answers would run on"
    checks[run_on] = eos is not None and eos not in ends
    return [fault for fault, holds in checks.items() if holds]
