"""LoRA and QLoRA: the adapter that is trained, new or there already, what it is put on, and the 4-bit weights below."""

import functools
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from dpo_kit.config.compose import CONF
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError, ModelError, did_you_mean
from dpo_kit.model.adapter_origin import refuse_adapter_weights
from dpo_kit.model.load import is_plain, load_weights, read_config
from dpo_kit.model.origin import Start, find_parent, find_start
from dpo_kit.model.scoring import uses_fused_head
from dpo_kit.run.directory import FACTS

log = logging.getLogger(__name__)
OF_ADAPTER = re.compile(r"\.default(?=\.|$)")  # in names of weights: at the end for an adapter on embeddings


def build_adapter(model: Model) -> LoraConfig | None:
    """The new LoRA that wraps the policy; None under full tuning, and where training goes on from one that is there.

    Raises ConfigError for options that PEFT refuses, or that are not those of the adapter that is there.
    """
    if model.tuning == "full":
        return None
    if (there := find_start(model).adapter) is None:
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


def fit_targets(adapter: LoraConfig, policy: PreTrainedModel, trainer: type) -> None:
    """Leave out of all-linear what an adapter would not reach. ConfigError for names of modules that the policy lacks,
    and for named ones that `trainer` would never train; a warning for one of two embeddings that the policy ties.
    """
    head = next((name for name, module in policy.named_modules() if module is policy.get_output_embeddings()), None)
    if head and _is_target(head, adapter.target_modules) and uses_fused_head(trainer):
        raise ConfigError(
            f"model.lora.target_modules puts an adapter on {head}, but {trainer.__name__} works out log-probabilities "
            f"from the head's own weights, so that it would never be trained: take {head} out, or train the whole "
            f"head, model.lora.modules_to_save=[{head}]"
        )
    past = bypassed(policy)
    if adapter.target_modules == "all-linear" and past and not isinstance(adapter.exclude_modules, str):
        adapter.exclude_modules = sorted(short_names(past) | set(adapter.exclude_modules or ()))
    elif named := [name for name in past if _is_target(name, adapter.target_modules)]:
        raise ConfigError(
            f"model.lora.target_modules puts an adapter on {named[0]}, whose weights this model also reads past the "
            "module, so that the adapter would not be trained there: take it out; all-linear leaves it out by itself"
        )
    modules, touched = dict(policy.named_modules()), set()
    for key in ("target_modules", "modules_to_save"):
        # a string is a pattern or all-linear, which PEFT itself refuses where it fits nothing
        names = [] if isinstance(given := getattr(adapter, key), str) else sorted(given or [])
        touched |= {"lm_head", "embed_tokens"} & {*names}
        for wanted in names:
            if not any(_is_target(name, [wanted]) for name in modules):
                own = sorted({name.rpartition(".")[2] for name, each in modules.items() if [*each.parameters(False)]})
                meant = did_you_mean(wanted, own, f": it has {', '.join(own)}", count=2)
                raise ConfigError(f"model.lora.{key}: this model has no module {wanted}{meant}")
    if touched and policy.config.get_text_config().tie_word_embeddings and not adapter.ensure_weight_tying:
        log.warning(
            "model.lora puts an adapter on %s, one of two embeddings that this model ties: they will differ after "
            "training, and the exported model holds both; +model.lora.ensure_weight_tying=true keeps them one",
            " and ".join(sorted(touched)),
        )


def _is_target(name: str, targets: Any) -> bool:
    """Whether PEFT means the module `name` by `targets`: ends of names, or a pattern of whole ones."""
    if isinstance(targets, str):
        return targets != "all-linear" and bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def bypassed(model: nn.Module) -> list[str]:
    """The full names of linear modules whose weights the code around them reads itself, past the module, as state-space
    mixers do: an adapter there would not be trained, and 4-bit weights would not be read.
    """
    read = r"self\.{}\.weight(?!\w|\[|\.dtype|\.device|\.shape)"
    return [
        f"{name}.{child}"
        for name, parent in model.named_modules()
        for child, module in parent.named_children()
        if isinstance(module, nn.Linear) and re.search(read.format(child), _methods(type(parent)))  # type: ignore[arg-type]
    ]


@functools.cache
def _methods(kind: type) -> str:
    """The source of the methods of a class but its initialisation."""
    methods = (part for name, part in vars(kind).items() if inspect.isfunction(part) and "init" not in name)
    return "".join(map(inspect.getsource, methods))


def short_names(names: list[str]) -> set[str]:
    """The last two parts of each name, which all layers have in common."""
    return {".".join(name.split(".")[-2:]) for name in names}


def quantization(model: Model) -> BitsAndBytesConfig:
    config = read_config(model)
    whole = None if is_plain(config) else kept_whole(config)
    try:
        return BitsAndBytesConfig(**{"llm_int8_skip_modules": whole} | model.quantization)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.quantization: transformers.BitsAndBytesConfig refuses it: {error}") from error


def kept_whole(config: Any) -> list[str] | None:
    """What of a model of this config is not to be quantised; None where transformers knows it by itself."""
    model = weightless(config)
    names = short_names(bypassed(model))
    return sorted({*names, *get_keys_to_not_convert(model)}) if names else None


def weightless(config: Any) -> Any:
    """A model of this config without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def keep_4bit_weights_as_they_are(weights: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks them in place at the first evaluation: the rounded scales change
    training, and a width that is no multiple of the block size fails (bitsandbytes-foundation/bitsandbytes#1804).
    """
    from bitsandbytes.nn import Linear4bit

    for module in weights.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def warn_of_rounding(model: Model) -> None:
    """Say what becomes of a tuned policy whose adapter is merged already."""
    path = model.path
    if find_start(model).adapter is None and ((Path(path) / FACTS).exists() or find_parent("model.path", path)):
        log.warning(
            "model.path=%s is a tuned policy: 4 bit rounds away part of what tuning changed, and training starts from "
            "what is left; after LoRA or QLoRA go on with the adapter itself, model.path=<its run>/model",
            path,
        )
