"""Policy, reference, tokenizer and adapter, as the `model` group says: safetensors only, no code from a repository."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from dpo_kit.control_tokens import neutralised
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.hardware import has_accelerator, weight_dtype
from dpo_kit.origin import find_parent, refuse_unsafe
from dpo_kit.settings import Model

log = logging.getLogger(__name__)


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer with a padding token, which reads control tokens in messages as text.

    ModelError where the path holds none, is part of an unfinished run, or where the reference's vocabulary is another.
    """
    for key, path in (("model.path", model.path), ("model.reference", model.reference)):
        if path:
            find_parent(key, path)
    tokenizer = _load(AutoTokenizer, model.path, model)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {model.path} has no EOS token, so that no answer would ever end: set one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.reference:
        _refuse_other_vocabulary(model, tokenizer)
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template)
    return neutralised(tokenizer)


def read_template(given: str) -> str:
    """The Jinja text of `model.chat_template`: `given` itself, or what the file of that name holds."""
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.chat_template must be a Jinja template or a file with one, got {given} ({error}): name the file "
            "with its folder"
        ) from error


def load_policy(model: Model, tokenizer: Any) -> PreTrainedModel:
    """The weights to be tuned; 4-bit under `tuning=qlora`."""
    policy = load_weights(model)
    _refuse_foreign_tokenizer(policy, tokenizer, model.path)
    warn_of_tied_head(model, policy)
    return policy


def load_reference(model: Model) -> PreTrainedModel:
    """The reference: the policy's own start, or `model.reference`; frozen."""
    return load_weights(model, model.reference or model.path).eval().requires_grad_(False)


def load_tuned(model: Model, folder: Path) -> PreTrainedModel:
    """What a run left in `folder`: the tuned weights, or its adapter on the weights that it started from."""
    if model.tuning == "full":
        return load_weights(model, str(folder))
    return PeftModel.from_pretrained(load_weights(model), folder)  # type: ignore[return-value]


def warn_of_tied_head(model: Model, policy: PreTrainedModel) -> None:
    """Say what an adapter on one of two tied embeddings means: they come apart, in training and in what is exported."""
    named = [name for key in ("target_modules", "modules_to_save") for name in _names(model.lora.get(key))]
    touched = sorted({name for name in named if name in ("lm_head", "embed_tokens")})
    tied = policy.config.get_text_config().tie_word_embeddings
    if model.tuning != "full" and touched and tied and not model.lora.get("ensure_weight_tying"):
        log.warning(
            "model.lora puts an adapter on %s, one of two embeddings that this model ties: they will differ after "
            "training, and the exported model holds both; +model.lora.ensure_weight_tying=true keeps them one",
            " and ".join(touched),
        )


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def build_adapter(model: Model) -> PeftConfig | None:
    """The LoRA that wraps the policy, or None under full tuning. Raises ConfigError for options that PEFT refuses."""
    if model.tuning == "full":
        return None
    try:
        return LoraConfig(task_type="CAUSAL_LM", **model.lora)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora: peft.LoraConfig refuses it: {error}") from error


def load_weights(model: Model, path: str | None = None) -> PreTrainedModel:
    """The weights at `path` (default: model.path) in the dtype, attention and quantisation that `model` asks for."""
    path = path or model.path
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
    key = "model.reference" if path == model.reference and path != model.path else "model.path"
    options |= {"revision": model.revision, "code_revision": model.revision} if path == model.path else {}
    _refuse_wrong_path(key, path)
    refuse_unsafe(key, path, options.get("revision"))
    trusted = model.trust_remote_code and path == model.path  # the commit is that of model.path's repository
    try:
        return auto_class.from_pretrained(path, trust_remote_code=trusted, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{key}={path} cannot be loaded: {reason}{_remedy(reason)}") from error


def _remedy(reason: str) -> str:
    if "custom code" in reason:
        return (
            " Its code is not run: take a model of the kinds that transformers knows, or read the code and then name "
            "repository and commit: model.path=org/name model.revision=<40 hex digits> model.trust_remote_code=true"
        )
    if "safetensors" in reason:
        return (
            " Only safetensors are loaded, no pickles: take a revision that has them, or convert the weights yourself"
        )
    return ""


def _refuse_wrong_path(key: str, path: str) -> None:
    """A path that is meant to be local but is not there, before the hub is asked for it."""
    local = Path(path).expanduser()
    if local.exists() or not path.startswith((".", "/", "~")):
        return
    siblings = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
    near = difflib.get_close_matches(local.name, siblings, n=2)
    raise ModelError(f"{key}={path} does not exist" + (f"; did you mean {' or '.join(near)}?" if near else ""))


SAMPLE = ("Hello, world!", "naïve café, 東京 🙂", "  two  spaces\n\tand a tab", "x = 3.14159 * 2**10  # code", "don't")
"""Texts that tokenizers of one vocabulary but other merges or normalisation encode differently."""


def _refuse_other_vocabulary(model: Model, tokenizer: Any) -> None:
    """ModelError where the reference reads token ids otherwise than the policy, so that its log-probabilities would be
    those of other texts.
    """
    other = _load(AutoTokenizer, str(model.reference), model)
    rows, rows_there = (_load(AutoConfig, path, model).get_text_config().vocab_size for path in _both(model))
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    names = (("eos_token_id", tokenizer.eos_token_id, other.eos_token_id), ("rows of the embedding", rows, rows_there))
    moved = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    differing = [f"{name}: {here} and {there}" for name, here, there in names if here != there]
    differing += [f"token {moved[0]!r}: {mine.get(moved[0])} and {theirs.get(moved[0])}"] if moved else []
    ids = [[each(text, add_special_tokens=False)["input_ids"] for text in SAMPLE] for each in (tokenizer, other)]
    differing += [f"{text!r} is encoded differently" for text, a, b in zip(SAMPLE, *ids, strict=True) if a != b][:1]
    if differing:
        raise ModelError(
            f"model.reference={model.reference} has another vocabulary than model.path={model.path} "
            f"({'; '.join(differing)}): its log-probabilities would be those of other texts. Take a reference of the "
            "same tokenizer, or resize and save both models alike"
        )


def _both(model: Model) -> tuple[str, str]:
    return model.path, str(model.reference)


def _refuse_foreign_tokenizer(policy: Any, tokenizer: Any, path: str) -> None:
    rows = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {path} knows {len(tokenizer)} tokens, its model only {rows}: they do not "
            "belong together; take both from one place"
        )
