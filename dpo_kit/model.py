"""Policy, reference, tokenizer and adapter, as the `model` group says: safetensors only, no code from a repository."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.hardware import has_accelerator, weight_dtype
from dpo_kit.settings import Model


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer with a padding token. Raises ModelError where the path holds none."""
    _refuse_wrong_path(model.path)
    tokenizer = _load(AutoTokenizer, model.path, model)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {model.path} has no EOS token, so that no answer would ever end: set one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(model: Model, tokenizer: Any) -> PreTrainedModel:
    """The weights to be tuned; 4-bit under `tuning=qlora`."""
    policy = _load_weights(model, model.path)
    _refuse_foreign_tokenizer(policy, tokenizer, model.path)
    return policy


def load_reference(model: Model) -> PreTrainedModel:
    """The reference: the policy's own start, or `model.reference`; frozen."""
    return _load_weights(model, model.reference or model.path).eval().requires_grad_(False)


def load_tuned(model: Model, folder: Path) -> PreTrainedModel:
    """What a run left in `folder`: the tuned weights, or its adapter on the weights that it started from."""
    if model.tuning == "full":
        return _load_weights(model, str(folder))
    return PeftModel.from_pretrained(_load_weights(model, model.path), folder)  # type: ignore[return-value]


def build_adapter(model: Model) -> PeftConfig | None:
    """The LoRA that wraps the policy, or None under full tuning. Raises ConfigError for options that PEFT refuses."""
    if model.tuning == "full":
        return None
    try:
        return LoraConfig(task_type="CAUSAL_LM", **model.lora)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora: peft.LoraConfig refuses it: {error}") from error


def describe_architecture(model: Model) -> dict[str, Any]:
    """The model's own config, as a manifest records it."""
    return _load(AutoConfig, model.path, model).to_dict()


def _load_weights(model: Model, path: str) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": weight_dtype(model.dtype, model.tuning), "use_safetensors": True}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if model.tuning == "qlora":
        options["quantization_config"] = _quantization(model)
        options["device_map"] = {"": torch.cuda.current_device() if has_accelerator() else "cpu"}
    weights = _load(AutoModelForCausalLM, path, model, **options)
    if getattr(weights, "is_loaded_in_4bit", False):
        _keep_4bit_weights_as_they_are(weights)
    weights.config.use_cache = False  # scoring and training never read it; sampling turns it on for itself
    return weights


def _keep_4bit_weights_as_they_are(weights: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks them in place at the first evaluation: the rounded scales change
    training, and a width that is no multiple of the block size fails (bitsandbytes-foundation/bitsandbytes#1804).
    """
    from bitsandbytes.nn import Linear4bit

    for module in weights.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization(model: Model) -> BitsAndBytesConfig:
    try:
        return BitsAndBytesConfig(**model.quantization)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.quantization: transformers.BitsAndBytesConfig refuses it: {error}") from error


def _load(auto_class: Any, path: str, model: Model, **options: Any) -> Any:
    revision = model.revision if path == model.path else None
    try:
        return auto_class.from_pretrained(path, revision=revision, trust_remote_code=model.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path={path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _refuse_wrong_path(path: str) -> None:
    """A path that is meant to be local but is not there, before the hub is asked for it."""
    local = Path(path).expanduser()
    if local.exists() or not path.startswith((".", "/", "~")):
        return
    siblings = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
    near = difflib.get_close_matches(local.name, siblings, n=2)
    raise ModelError(f"model.path={path} does not exist" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def _refuse_foreign_tokenizer(policy: Any, tokenizer: Any, path: str) -> None:
    rows = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {path} knows {len(tokenizer)} tokens, its model only {rows}: they do not belong together"
        )
