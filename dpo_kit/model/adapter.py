"""LoRA and QLoRA: the adapter that is trained, new or there already, and the 4-bit weights below it."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig

from dpo_kit.config.compose import CONF
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.adapter_weights import refuse_adapter_weights
from dpo_kit.model.load import is_plain, load_weights, read_config
from dpo_kit.model.origin import Start, find_start
from dpo_kit.run.directory import FACTS

log = logging.getLogger(__name__)
OF_ADAPTER = re.compile(r"\.default(?=\.|$)")  # in names of weights: at the end for an adapter on embeddings


def build_adapter(model: Model | Start) -> LoraConfig | None:
    """The new LoRA that wraps the policy; None under full tuning, and where training goes on from one that is there.

    Raises ConfigError for options that PEFT refuses, or that are not those of the adapter that is there.
    """
    start = find_start(model)
    model, there = start.model, start.adapter
    if model.tuning == "full":
        return None
    if there is None:
        try:
            return LoraConfig(task_type="CAUSAL_LM", **model.lora)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.lora: peft.LoraConfig refuses it: {error}") from error
    usual: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "local.yaml").lora)
    differing = [
        f"{name}: {value} asked, {there.get(name)} there"
        for name, value in model.lora.items()
        if value != usual.get(name) and _as_set(value) != _as_set(there.get(name))  # what nobody has asked may differ
    ]
    if differing:
        raise ConfigError(
            f"model.lora asks for another adapter than the one at model.path={model.path} ({'; '.join(differing)}): "
            "leave these options out, training goes on with the adapter as it is; or begin a new one on its base, "
            f"model.path={there['base_model_name_or_path']}"
        )
    return None


def _as_set(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list | tuple) else value


def load_adapter(start: Start) -> Any:
    """The adapter at `model.path` on its base, ready to be trained on."""
    refuse_adapter_weights(start)
    options: dict[str, Any] = {"is_trainable": True, "revision": start.model.revision or "main"}
    policy = PeftModel.from_pretrained(load_weights(start.base), start.model.path, **options).eval()
    for name, weight in policy.named_parameters():
        if start.model.tuning == "qlora" and weight.requires_grad and "magnitude" not in name:
            weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)  # as TRL will round what it trains
    return policy


def keep_start(policy: Any) -> None:
    """Give an adapter that training goes on from a frozen copy, named as TRL names the one of its own trainers with a
    reference; nothing where the policy is no adapter yet.
    """
    if not isinstance(policy, PeftModel):
        return
    policy.add_adapter("ref", policy.peft_config["default"])
    for name, weight in policy.named_parameters():
        copy = OF_ADAPTER.sub(".ref", name)
        if copy != name:
            policy.get_parameter(copy).data.copy_(weight.data)


def refuse_uncopied(policy: Any) -> None:
    """ModelError for an adapter that training goes on from, of which TRL's trainers leave a part at its random start
    when they copy it as their reference: those on embeddings.
    """
    if names := [name for name, _ in policy.named_parameters() if name.endswith(".default")]:
        part = names[0].removeprefix("base_model.model.").removesuffix(".default")
        raise ModelError(
            f"the adapter at model.path has {part}, which TRL leaves out when it copies the adapter as the reference: "
            "merge it into its base first and begin a new one on that (python -m dpo_kit export, or peft's "
            "merge_and_unload), or take a method without a reference"
        )


def quantization(model: Model) -> BitsAndBytesConfig:
    whole = None
    if not is_plain(config := read_config(model)):
        from dpo_kit.model.bypassed import kept_whole

        whole = kept_whole(config)
    try:
        return BitsAndBytesConfig(**{"llm_int8_skip_modules": whole} | model.quantization)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.quantization: transformers.BitsAndBytesConfig refuses it: {error}") from error


def warn_of_rounding(start: Start) -> None:
    """Say what becomes of a tuned policy whose adapter is merged already."""
    path = start.model.path
    if start.adapter is None and ((Path(path) / FACTS).exists() or start.parent):
        log.warning(
            "model.path=%s is a tuned policy: 4 bit rounds away part of what tuning changed, and training starts from "
            "what is left; after LoRA or QLoRA go on with the adapter itself, model.path=<its run>/model",
            path,
        )
