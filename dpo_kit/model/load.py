"""Policy, reference, tokenizer and adapter, as the `model` group says: safetensors only, no code from a repository."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    Mxfp4Config,
    PreTrainedModel,
)

from dpo_kit.config.compose import usual_lora
from dpo_kit.config.data_files import near_miss
from dpo_kit.config.places import weights_faults
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.control_tokens import neutralised
from dpo_kit.model.hardware import has_accelerator, weight_dtype
from dpo_kit.model.origin import (
    base_of,
    find_parent,
    has_tokenizer,
    quantised_by,
    read_adapter,
    refuse_adapter,
    refuse_unsafe,
)
from dpo_kit.model.turns import ends_of, stop_ids
from dpo_kit.run.files import hash_weights

log = logging.getLogger(__name__)
OF_ADAPTER = re.compile(r"\.default(?=\.|$)")  # in names of weights: at the end for an adapter on embeddings


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer with a padding token, which reads control tokens in messages as text.

    ModelError where the path holds none, is part of an unfinished run, or where the reference's vocabulary is another.
    """
    for key, path in (("model.path", model.path), ("model.reference", model.reference)):
        if path:
            find_parent(key, path)
    base = base_of(model)
    home = model if has_tokenizer(model.path, model.revision) else base
    tokenizer = _load(AutoTokenizer, home.path, home)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {model.path} has no EOS token, so that no answer would ever end: set one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.reference:
        _refuse_other_vocabulary(model, tokenizer)
        _refuse_second_copy(model)
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template)
    return neutralised(tokenizer, _ends(base))


def _ends(base: Model) -> list[int]:
    """The tokens at which the model's own generation ends."""
    try:
        return ends_of(GenerationConfig.from_pretrained(base.path, revision=base.revision or "main"))
    except OSError:  # without a generation_config.json transformers takes it from the model's config
        return ends_of(_load(AutoConfig, base.path, base).get_text_config())


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
    """The weights to be tuned, 4-bit under `tuning=qlora`; or the adapter that training goes on from, on its base."""
    if model.attn_implementation == "flex_attention" and not has_accelerator():
        raise ConfigError("model.attn_implementation=flex_attention has no backward pass on a CPU: leave it out")
    if model.tuning == "qlora" and (
        find_parent("model.path", model.path) or (Path(model.path) / "export.json").exists()
    ):
        _warn_of_rounding(model)
    policy = load_start(model)
    _refuse_foreign_tokenizer(policy, tokenizer, model.path)
    end_as_trained(policy.get_base_model() if isinstance(policy, PeftModel) else policy, tokenizer)
    return policy


def end_as_trained(model: Any, tokenizer: Any) -> None:
    """Let the model's own generation end at every token that ends an answer in training, here and where it is saved."""
    ends = stop_ids(tokenizer, model)
    if added := sorted(set(ends) - set(ends_of(model.generation_config))):
        log.info("generation_config: answers end at %s too", ", ".join(tokenizer.convert_ids_to_tokens(added)))
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def _warn_of_rounding(model: Model) -> None:
    """Say what becomes of a tuned policy whose adapter is merged already."""
    if read_adapter(model) is None:
        log.warning(
            "model.path=%s is a tuned policy: 4 bit rounds away part of what tuning changed, and training starts from "
            "what is left; after LoRA or QLoRA go on with the adapter itself, model.path=<its run>/model",
            model.path,
        )


def load_reference(model: Model) -> PreTrainedModel:
    """The reference: the policy's own start, or `model.reference`; frozen."""
    reference = load_weights(model, model.reference) if model.reference else load_start(model)
    return reference.eval().requires_grad_(False)


def load_start(model: Model) -> Any:
    """What training starts from: the weights at `model.path`, or its adapter on its base, ready to be trained."""
    if read_adapter(model) is None:
        return load_weights(model)
    from dpo_kit.model.adapter_weights import refuse_adapter_weights

    refuse_adapter_weights(model)
    revision = model.revision or "main"
    start = PeftModel.from_pretrained(
        load_weights(base_of(model)), model.path, is_trainable=True, revision=revision
    ).eval()
    for name, weight in start.named_parameters():
        if model.tuning == "qlora" and weight.requires_grad and "magnitude" not in name:
            weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)  # as TRL will round what it trains
    return start


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
    names = [name for name, _ in policy.named_parameters() if name.endswith(".default")]
    if names:
        part = names[0].removeprefix("base_model.model.").removesuffix(".default")
        raise ModelError(
            f"the adapter at model.path has {part}, which TRL leaves out when it copies the adapter as the reference: "
            "merge it into its base first and begin a new one on that (python -m dpo_kit export, or peft's "
            "merge_and_unload), or take a method without a reference"
        )


def load_tuned(model: Model, folder: Path) -> PreTrainedModel:
    """What a run left in `folder`: the tuned weights, or its adapter on the weights that it started from."""
    if model.tuning == "full":
        return load_weights(model, str(folder))
    return PeftModel.from_pretrained(load_weights(base_of(model)), folder)  # type: ignore[return-value]


def build_adapter(model: Model) -> LoraConfig | None:
    """The new LoRA that wraps the policy; None under full tuning, and where training goes on from one that is there.

    Raises ConfigError for options that PEFT refuses, or that are not those of the adapter that is there.
    """
    if model.tuning == "full":
        return None
    if (there := read_adapter(model)) is not None:
        _refuse_other_options(model, there)
        return None
    try:
        return LoraConfig(task_type="CAUSAL_LM", **model.lora)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora: peft.LoraConfig refuses it: {error}") from error


def read_lora(model: Model) -> LoraConfig | None:
    """The LoRA that the policy has in training, new or there already; None under full tuning."""
    if (new := build_adapter(model)) or model.tuning == "full":
        return new
    there: Any = PeftConfig.from_pretrained(model.path, revision=model.revision or "main")
    there.inference_mode = False  # as every saved adapter has it
    return there


def _refuse_other_options(model: Model, there: dict[str, Any]) -> None:
    """ConfigError where `model.lora` asks, other than by default, for something that the adapter `there` is not."""
    asked = {name: value for name, value in model.lora.items() if value != usual_lora().get(name)}
    differing = [
        f"{name}: {value} asked, {there.get(name)} there"
        for name, value in asked.items()
        if _as_set(value) != _as_set(there.get(name))
    ]
    if differing:
        raise ConfigError(
            f"model.lora asks for another adapter than the one at model.path={model.path} ({'; '.join(differing)}): "
            "leave these options out, training goes on with the adapter as it is; or begin a new one on its base, "
            f"model.path={there['base_model_name_or_path']}"
        )


def _as_set(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list | tuple) else value


def load_weights(model: Model, path: str | None = None) -> PreTrainedModel:
    """The weights at `path` (default: model.path) in the dtype, attention and quantisation that `model` asks for."""
    path = path or model.path
    if (folder := Path(path).expanduser()).is_dir() and path == model.path:
        path = str(folder.resolve())  # an adapter's folder will name it, to be found from any other
        model = model.model_copy(update={"path": path})
    options: dict[str, Any] = {"dtype": weight_dtype(model.dtype, model.tuning), "use_safetensors": True}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if model.tuning == "qlora":
        options["quantization_config"] = _quantization(model)
        options["device_map"] = {"": torch.cuda.current_device() if has_accelerator() else "cpu"}
    elif (
        quantised_by(path, model.revision if path == model.path else None) == "mxfp4"
    ):  # which cannot be trained as it is
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    weights = _load(AutoModelForCausalLM, path, model, **options)
    if getattr(weights, "is_loaded_in_4bit", False):
        _keep_4bit_weights_as_they_are(weights)
    weights.config.use_cache = False  # scoring and training never read it; sampling turns it on for itself
    return weights


def rounded_share(model: Any, rate: float) -> float:
    """The share of the trained weights that a step of `rate` would not change, as it is below half of their spacing."""
    unchanged = trained = 0
    rate = rate or 1.0  # a rate of 0 is meant
    for weight in (each for each in model.parameters() if each.requires_grad):
        trained += weight.numel()
        if weight.dtype in (torch.bfloat16, torch.float16):
            exponent = torch.frexp(weight.detach().float()).exponent  # spacing: 2 ** (exponent - 1) * eps
            coarse = exponent - 2 > math.log2(rate / torch.finfo(weight.dtype).eps)
            unchanged += int((coarse & (weight != 0)).sum())
    return unchanged / trained if trained else 0.0


def _keep_4bit_weights_as_they_are(weights: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks them in place at the first evaluation: the rounded scales change
    training, and a width that is no multiple of the block size fails (bitsandbytes-foundation/bitsandbytes#1804).
    """
    from bitsandbytes.nn import Linear4bit

    for module in weights.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization(model: Model) -> BitsAndBytesConfig:
    whole = None
    if not is_plain(config := read_config(model)):
        from dpo_kit.model.bypassed import kept_whole

        whole = kept_whole(config)
    try:
        return BitsAndBytesConfig(**{"llm_int8_skip_modules": whole} | model.quantization)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.quantization: transformers.BitsAndBytesConfig refuses it: {error}") from error


def _load(auto_class: Any, path: str, model: Model, **options: Any) -> Any:
    key = "model.reference" if path == model.reference and path != model.path else "model.path"
    options |= {"revision": model.revision, "code_revision": model.revision} if path == model.path else {}
    for fault in weights_faults(key, path):  # before the hub is asked for what is meant to be here
        raise ModelError(fault)
    if auto_class is not AutoTokenizer:
        refuse_adapter(key, path, options.get("revision"))
    refuse_unsafe(key, path, options.get("revision"))
    trusted = model.trust_remote_code and path == model.path  # the commit is that of model.path's repository
    try:
        return auto_class.from_pretrained(path, trust_remote_code=trusted, **options)
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        near = "" if Path(path).expanduser().exists() else near_miss(path)
        raise ModelError(f"{key}={path} cannot be loaded: {reason}{_remedy(reason) or near}") from error


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


SAMPLE = ("Hello, world!", "naïve café, 東京 🙂", "  two  spaces\n\tand a tab", "x = 3.14159 * 2**10  # code", "don't")
"""Texts that tokenizers of one vocabulary but other merges or normalisation encode differently."""


def _refuse_other_vocabulary(model: Model, tokenizer: Any) -> None:
    """ModelError where the reference reads token ids otherwise than the policy, so that its log-probabilities would be
    those of other texts.
    """
    other = _load(AutoTokenizer, str(model.reference), model)
    base = base_of(model)
    rows, rows_there = (
        _load(AutoConfig, path, base).get_text_config().vocab_size for path in (base.path, str(model.reference))
    )
    differing = [f"rows of the embedding: {rows} and {rows_there}"] if rows != rows_there else []
    differing += token_differences(tokenizer, other)
    if differing:
        raise ModelError(
            f"model.reference={model.reference} has another vocabulary than model.path={model.path} "
            f"({'; '.join(differing)}): its log-probabilities would be those of other texts. Take a reference of the "
            "same tokenizer, or resize and save both models alike"
        )


def token_differences(tokenizer: Any, other: Any) -> list[str]:
    """Where two tokenizers give the same text other ids, or read the same ids as other text; empty where nowhere."""
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    moved = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    ends = (tokenizer.eos_token_id, other.eos_token_id)
    differing = [f"eos_token_id: {ends[0]} and {ends[1]}"] if ends[0] != ends[1] else []
    differing += [f"token {moved[0]!r}: {mine.get(moved[0])} and {theirs.get(moved[0])}"] if moved else []
    ids = [[each(text, add_special_tokens=False)["input_ids"] for text in SAMPLE] for each in (tokenizer, other)]
    return (
        differing + [f"{text!r} is encoded differently" for text, a, b in zip(SAMPLE, *ids, strict=True) if a != b][:1]
    )


def _refuse_second_copy(model: Model) -> None:
    """ConfigError where the reference beside a new adapter has the very weights of the base."""
    if model.tuning == "full" or read_adapter(model) is not None or _sizes(model.path) != _sizes(str(model.reference)):
        return
    if (own := hash_weights(model.path)) and own == hash_weights(str(model.reference)):
        raise ConfigError(
            f"model.reference={model.reference} has the very weights of model.path={model.path}, which "
            f"model.tuning={model.tuning} has already (the policy with its adapter off): leave it out, and save a "
            "second model's memory"
        )


def _sizes(path: str) -> list[int]:
    return sorted(file.stat().st_size for file in Path(path).expanduser().glob("*.safetensors"))


def _refuse_foreign_tokenizer(policy: Any, tokenizer: Any, path: str) -> None:
    rows = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {path} knows {len(tokenizer)} tokens, its model only {rows}: they do not "
            "belong together; take both from one place"
        )


def read_config(model: Model) -> Any:
    """The model's config alone. ModelError where there is none."""
    base = base_of(model)
    try:
        trusted = {"trust_remote_code": base.trust_remote_code, "code_revision": base.revision}
        return AutoConfig.from_pretrained(base.path, revision=base.revision or "main", **trusted)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path={base.path} cannot be planned with: {str(error).splitlines()[0]} Name a "
            "folder or hub id with a config.json"
        ) from error


PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # kinds of models of which trainer/families.py has nothing to say


def is_plain(config: Any) -> bool:
    """Whether a model of this config trains as TRL has it, without what trainer/families.py does and refuses."""
    drops = any("drop" in name and value for name, value in config.to_dict().items())
    return config.model_type in PLAIN and not drops and not hasattr(config, "quantization_config")
