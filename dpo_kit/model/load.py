"""Policy, reference and tokenizer, as the `model` group says: safetensors only, no code from a repository."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from dpo_kit.config.data_files import near_miss
from dpo_kit.config.places import weights_faults
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.batches import bare
from dpo_kit.model.hardware import has_accelerator, weight_dtype
from dpo_kit.model.origin import ADAPTER, find_parent, find_start, has_tokenizer, quantised_by, read_file, refuse_unsafe
from dpo_kit.model.turns import ends_of, neutralised, stop_ids

log = logging.getLogger(__name__)


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer with a padding token, which reads control tokens in messages as text.

    ModelError where the path holds none, is part of an unfinished run, or where the reference's vocabulary is another.
    """
    for key, path in (("model.path", model.path), ("model.reference", model.reference)):
        if path:
            find_parent(key, path)
    start = find_start(model)
    base = start.base
    home = model if has_tokenizer(model.path, model.revision) else base
    tokenizer = load_named(AutoTokenizer, home.path, home)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {model.path} has no EOS token, so that no answer would ever end: set one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.reference:
        from dpo_kit.model.other_reference import refuse_other_vocabulary, refuse_second_copy

        refuse_other_vocabulary(start, tokenizer)
        refuse_second_copy(start)
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template)
    try:
        ends = ends_of(GenerationConfig.from_pretrained(base.path, revision=base.revision or "main"))
    except OSError:  # without a generation_config.json transformers takes it from the model's config
        ends = ends_of(load_named(AutoConfig, base.path, base).get_text_config())
    return neutralised(tokenizer, ends)


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
    if model.tuning == "qlora":
        from dpo_kit.model.adapter import warn_of_rounding

        warn_of_rounding(model)
    policy = load_start(model)
    if len(tokenizer) > (rows := policy.get_input_embeddings().weight.shape[0]):
        raise ModelError(
            f"the tokenizer of {model.path} knows {len(tokenizer)} tokens, its model only {rows}: they do not "
            "belong together; take both from one place"
        )
    end_as_trained(bare(policy), tokenizer)
    return policy


def end_as_trained(model: Any, tokenizer: Any) -> None:
    """Let the model's own generation end at every token that ends an answer in training, here and where it is saved."""
    ends = stop_ids(tokenizer, model)
    if added := sorted(set(ends) - set(ends_of(model.generation_config))):
        log.info("generation_config: answers end at %s too", ", ".join(tokenizer.convert_ids_to_tokens(added)))
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def load_reference(model: Model) -> PreTrainedModel:
    """The reference: the policy's own start, or `model.reference`; frozen."""
    reference = load_weights(model, model.reference) if model.reference else load_start(model)
    return reference.eval().requires_grad_(False)


def load_start(model: Model) -> Any:
    """What training starts from: the weights at `model.path`, or its adapter on its base, ready to be trained."""
    if not (start := find_start(model)).adapter:
        return load_weights(model)
    from dpo_kit.model.adapter import load_adapter

    return load_adapter(start)


def load_tuned(model: Model, folder: Path) -> PreTrainedModel:
    """What a run left in `folder`: the tuned weights, or its adapter on the weights that it started from."""
    if model.tuning == "full":
        return load_weights(model, str(folder))
    from peft import PeftModel

    return PeftModel.from_pretrained(load_weights(find_start(model).base), folder)  # type: ignore[return-value]


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
        from dpo_kit.model.adapter import quantization

        options["quantization_config"] = quantization(model)
        options["device_map"] = {"": torch.cuda.current_device() if has_accelerator() else "cpu"}
    elif quantised_by(path, model.revision if path == model.path else None) == "mxfp4":  # cannot be trained as it is
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    weights = load_named(AutoModelForCausalLM, path, model, **options)
    if getattr(weights, "is_loaded_in_4bit", False):
        from dpo_kit.model.adapter import keep_4bit_weights_as_they_are

        keep_4bit_weights_as_they_are(weights)
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


REMEDIES = {
    "custom code": " Its code is not run: take a model of the kinds that transformers knows, or read the code and then "
    "name repository and commit: model.path=org/name model.revision=<40 hex digits> model.trust_remote_code=true",
    "safetensors": " Only safetensors are loaded, no pickles: take a revision that has them, or convert the weights "
    "yourself",
}  # by what transformers says


def load_named(auto_class: Any, path: str, model: Model, **options: Any) -> Any:
    """What `auto_class` makes of `path`, one of the two that `model` names. ModelError says why it cannot be loaded."""
    key = "model.reference" if path == model.reference and path != model.path else "model.path"
    options |= {"revision": model.revision, "code_revision": model.revision} if path == model.path else {}
    for fault in weights_faults(key, path):  # before the hub is asked for what is meant to be here
        raise ModelError(fault)
    if auto_class is not AutoTokenizer and (adapter := read_file(path, ADAPTER, options.get("revision"))):
        from dpo_kit.model.adapter_origin import refuse_adapter

        refuse_adapter(key, path, adapter)
    refuse_unsafe(key, path, options.get("revision"))
    trusted = model.trust_remote_code and path == model.path  # the commit is that of model.path's repository
    try:
        return auto_class.from_pretrained(path, trust_remote_code=trusted, **options)
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        near = "" if Path(path).expanduser().exists() else near_miss(path)
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in reason), near)
        raise ModelError(f"{key}={path} cannot be loaded: {reason}{remedy}") from error


def read_config(model: Model) -> Any:
    """The model's config alone. ModelError where there is none."""
    base = find_start(model).base
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
