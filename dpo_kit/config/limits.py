"""What the libraries below would refuse only after a model is loaded, said while the config is checked. No torch."""

import importlib.metadata
import importlib.util
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Union

import pydantic

from dpo_kit.config.best_metric import SCHEDULES_BY_METRIC
from dpo_kit.config.settings import Settings
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import did_you_mean

POSITIVE = """
    num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps
    eval_steps save_steps max_length max_new_tokens max_completion_length adam_epsilon temperature
    precompute_ref_batch_size dataset_num_proc dataloader_prefetch_factor ref_model_sync_steps discopop_tau
    torch_empty_cache_steps ddp_timeout ddp_bucket_cap_mb repetition_penalty vllm_tensor_parallel_size
    vllm_server_timeout pad_to_multiple_of eval_accumulation_steps r lora_alpha
"""
NOT_NEGATIVE = """
    warmup_steps weight_decay max_grad_norm dataloader_num_workers eval_delay save_total_limit data_seed cpo_alpha
    neftune_noise_alpha top_k simpo_gamma desirable_weight undesirable_weight router_aux_loss_coef ld_alpha
    vllm_server_port vllm_group_port min_lr lr_end power num_cycles num_decay_steps num_stable_steps timescale
    learning_rate
"""
SHARES = "label_smoothing_factor ref_model_mixup_alpha top_p min_p vllm_gpu_memory_utilization min_lr_ratio min_lr_rate"
STEPS = "logging_steps eval_steps save_steps warmup_steps"
RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("must be above 0", lambda value: value > 0, POSITIVE),
    ("must be at least 0", lambda value: value >= 0, NOT_NEGATIVE),
    ("must lie in [0, 1]", lambda value: 0 <= value <= 1, SHARES),
    ("must lie in [0, 1)", lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 lora_dropout"),
    ("must be below 2**32, as numpy wants it", lambda value: value < 2**32, "data_seed"),
    ("must be at least 1, or -1 for whole epochs", lambda value: value == -1 or value >= 1, "max_steps"),
    ("must be a whole number of steps, or below 1 as a share of the run", lambda n: n < 1 or n % 1 == 0, STEPS),
)  # a rule, whether a value keeps it, the fields that have it
TYPES: dict[str, Any] = {t.__name__: t for t in (int, float, bool, str, dict, list)} | {"Any": Any, "None": None}


def library_faults(settings: Settings) -> Iterator[str]:
    """Values, combinations and packages with which TRL, transformers or peft would fail after loading."""
    trl, model = settings.trl, settings.model
    yield from number_faults("trl.", trl)
    for one, other in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if trl[one] and trl[other]:
            yield f"trl.{one}=true and trl.{other}=true exclude each other: set one of them"
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if trl[name] and trl["dataloader_num_workers"] == 0:
            yield f"trl.{name} needs processes that load: add trl.dataloader_num_workers=1, or leave it out"
    if trl["push_to_hub"] and not trl["hub_model_id"]:
        needed = "the name of a repository (else every run of yours goes to one called checkpoints)"
        remedy = "push the finished model, python -m dpo_kit export run=… push=org/name"
        yield f"trl.push_to_hub=true needs {needed}: add trl.hub_model_id=org/name, or {remedy}"
    yield from _schedule_faults(trl)
    if model.tuning != "full":
        yield from _lora_faults(model.lora)
    if model.tuning == "qlora":
        yield from field_faults("model.quantization", model.quantization, load_schema()["quantization"])
    yield from _package_faults(settings)


def number_faults(prefix: str, values: dict[str, Any]) -> Iterator[str]:
    """Numbers that are not finite, or out of the bounds that their name has."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) and key != "max_grad_norm":
            yield f"{prefix}{key} must be a finite number, got {value}"
            continue
        broken = next((rule for rule, holds, names in RULES if key in names.split() and not holds(value)), None)
        if broken:
            yield f"{prefix}{key} {broken}, got {value:g}"


def field_faults(prefix: str, values: dict[str, Any], fields: dict[str, Any]) -> Iterator[str]:
    """Names that `fields` has not, and values of other types; what can be read as its type is so in `values` then."""
    for name, value in values.items():
        if name not in fields:
            meant = did_you_mean(name, fields, f"; there are {', '.join(fields) or 'none'}" if len(fields) < 20 else "")
            yield f"unknown key {prefix}.{name}{meant}"
        elif value is not None:
            values[name], faults = checked_value(f"{prefix}.{name}", value, fields[name])
            yield from faults or number_faults(f"{prefix}.", {name: values[name]})


def checked_value(key: str, value: Any, field: dict[str, Any]) -> tuple[Any, list[str]]:
    """`value` as the type of `field` wants it (a lone one becomes a list where lists are taken), and its faults."""
    alone = {str: "str", float: "float", int: "float"}.get(type(value))
    if alone and f"list[{alone}]" in field["type"] and not re.search(rf"(^|\| ){alone}\b", field["type"]):
        value = [value]
    try:
        if isinstance(value, bool) and re.fullmatch(r"(int|float)( \| None)?", field["type"]):
            raise ValueError  # else true would be 1
        value = pydantic.TypeAdapter(_type(field["type"])).validate_python(value)
    except ValueError:
        unquoted_no = value is False and "choices" in field  # YAML reads a bare no as false
        remedy = f' (the YAML reading of a bare no: write {key}: "no")' if unquoted_no else ""
        return value, [f"{key} must be {field['type']}, got {value!r}{remedy}"]
    items = value if isinstance(value, list) else [value]
    wrong = [item for item in items if "choices" in field and item not in field["choices"]]
    return value, [wrong_choice(key, item, field["choices"]) for item in wrong]


def _type(annotation: str) -> Any:
    """The type that trl_schema.py writes as `annotation`: builtins, lists and dicts of them, joined by |."""
    if len(parts := annotation.split(" | ")) > 1:
        return Union[tuple(map(_type, parts))]  # noqa: UP007 - of types that are known only here
    outer, _, inner = annotation.removesuffix("]").partition("[")
    known = TYPES.get(outer, Any)
    return known[tuple(map(_type, inner.split(", ", 1)))] if inner else known


def wrong_choice(key: str, value: Any, choices: Iterable[Any]) -> str:
    """What is said of a value that is none of `choices`."""
    names = [str(choice) for choice in choices]
    same = [name for name in names if name.lower() == str(value).lower()]
    longer = same or [name for name in names if value and name.startswith(str(value).lower())]
    meant = f"; did you mean {' or '.join(longer[:3])}?" if longer else did_you_mean(str(value), names)
    return f"{key} must be one of {', '.join(names)}, got {value!r}{meant}"


def _schedule_faults(trl: dict[str, Any]) -> Iterator[str]:
    kind, options, schedules = trl["lr_scheduler_type"], trl["lr_scheduler_kwargs"] or {}, load_schema()["schedules"]
    key, given, takes = "trl.lr_scheduler_kwargs", f"trl.lr_scheduler_type={kind}", schedules[kind]
    if not isinstance(options, dict):
        yield f"{key} must be {{name: value}}, got {options!r}"
        return
    for name in [name for name in options if name not in takes]:
        others = [other for other, fields in schedules.items() if name in fields]
        meant = did_you_mean(name, takes) or (f"; {name} belongs to {', '.join(others)}" if others else "")
        yield f"{key}: {given} takes {', '.join(takes) or 'no arguments'}, got {name}{meant}"
    yield from field_faults(key, {name: value for name, value in options.items() if name in takes}, takes)
    for name in [name for name in ("min_lr", "lr_end") if name in takes]:  # a rate that ends there may rise
        end = options.get(name, takes[name]["default"])
        if isinstance(end, int | float) and end and end >= trl["learning_rate"]:
            default = "" if name in options else f", its default: add {key}={{{name}: 0}}"
            yield f"{key}.{name} must be below trl.learning_rate={trl['learning_rate']:g}, got {end:g}{default}"
    needed = [name for name, field in takes.items() if field["required"] and name not in options]
    if "min_lr" in takes and kind.startswith("cosine") and not {"min_lr", "min_lr_rate"} & options.keys():
        needed.append("min_lr: …} or {min_lr_rate")
    if needed:
        yield f"{given} needs {key}={{{', '.join(f'{name}: …' for name in needed)}}}"
    if kind in SCHEDULES_BY_METRIC and trl["eval_strategy"] == "no":
        yield f"{given} follows what evaluations measure, and trl.eval_strategy=no has none"


def _lora_faults(lora: dict[str, Any]) -> Iterator[str]:
    for key in ("target_modules", "modules_to_save"):
        named = lora.get(key)
        if isinstance(named, str) and named != "all-linear" and re.fullmatch(r"[\w, ]+", named):
            listed = f"model.lora.{key}=[{','.join(named.replace(',', ' ').split())}]"
            yield f"model.lora.{key}={named} would be read as a pattern of whole names: say {listed}"
            return
    if not lora.get("target_modules") and not lora.get("target_parameters"):
        yield "model.lora.target_modules must name modules, such as all-linear or [q_proj,v_proj], got none"
    yield from field_faults("model.lora", lora, load_schema()["lora"])


# --- words without effect ----------------------------------------------------------------------------------------

ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model.lora.": ("model.tuning", ("lora", "qlora")),
    "model.quantization.": ("model.tuning", ("qlora",)),
    "trl.eval_steps": ("trl.eval_strategy", ("steps",)),
    "trl.save_steps": ("trl.save_strategy", ("steps",)),
    "trl.logging_steps": ("trl.logging_strategy", ("steps",)),
    "trl.ref_model_": ("trl.sync_ref_model", (True,)),
    "trl.hub_": ("trl.push_to_hub", (True,)),
    "trl.vllm_": ("trl.use_vllm", (True,)),
    "trl.f_alpha_divergence_coef": ("trl.f_divergence_type", ("alpha_divergence",)),
    "trl.discopop_tau": ("trl.loss_type", ("discopop",)),
    "trl.simpo_gamma": ("trl.loss_type", ("simpo", "alphapo")),
    "trl.warmup_steps": (
        "trl.lr_scheduler_type",
        tuple(kind for kind in sorted(load_schema()["schedules"]) if kind not in ("constant", *SCHEDULES_BY_METRIC)),
    ),
    "data.holdout": ("data.eval", ("null",)),
}  # keys (or their beginning) that do nothing unless another key has one of these values


def idle_faults(settings: Settings, words: Iterable[str]) -> Iterator[str]:
    """The overrides among `words` that change nothing, as another key is not set."""
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        needed = next((needed for start, needed in ONLY_WITH.items() if key.startswith(start)), None)
        if needed is None or value in ("null", ""):
            continue
        current = settings.model_dump()
        for part in needed[0].split("."):
            current = current[part]
        values: list[Any] = current if isinstance(current, list) else ["null" if current is None else current]
        if not set(values) & set(needed[1]):
            other = " or ".join(f"{needed[0]}={str(value).lower()}" for value in needed[1][:2])
            now = ", ".join(str(value).lower() for value in values)
            yield f"{word} has no effect with {needed[0]}={now}: add {other}, or leave it out"


# --- packages that are not there ---------------------------------------------------------------------------------

BY_OPTIMIZER = {  # later ones win
    "bnb|_8bit|paged|lion|ademamix": "bitsandbytes", "galore": "galore_torch", "apollo": "apollo_torch",
    "lomo": "lomo_optim", "grokadamw": "grokadamw", "schedule_free": "schedulefree", "stable_adamw": "optimi",
    "adamw_torch_[48]bit": "torchao", "anyprecision": "torchdistx",
}  # fmt: skip
PUBLISHED_AS = {"optimi": "torch-optimi"}  # where the name to install is not that of the module


def _package_faults(settings: Settings) -> Iterator[str]:
    trl, reporter = settings.trl, settings.tracking.reporter
    kernel, optimizer = settings.model.attn_implementation or "", trl["optim"]
    by_optimizer = next((name for kind, name in reversed(BY_OPTIMIZER.items()) if re.search(kind, optimizer)), None)
    needs = (
        (f"tracking={reporter}", reporter not in ("none", "wandb") and reporter),
        (f"model.attn_implementation={kernel}", kernel.startswith("flash_attention") and "flash_attn"),
        ("trl.use_liger_kernel=true", trl.get("use_liger_kernel") and "liger_kernel"),
        (f"trl.deepspeed={trl['deepspeed']}", trl["deepspeed"] and "deepspeed"),
        (f"trl.optim={optimizer}", by_optimizer),
        ("trl.use_vllm=true", trl.get("use_vllm") and "vllm"),
        ("model.tuning=qlora", settings.model.tuning == "qlora" and "bitsandbytes"),
    )
    for word, module in needs:
        if module and (fault := missing_package(word, str(module))):
            yield fault


def missing_package(needed_by: str, module: str) -> str | None:
    """Why `needed_by` cannot be had: what to install for `module`; None where it is there."""
    if importlib.util.find_spec(module) is not None:
        return None
    name = PUBLISHED_AS.get(module, module.removeprefix("hydra_plugins.").replace("_", "-"))
    wanted = (line.partition(";")[0].strip() for line in importlib.metadata.requires("dpo-kit") or ())
    known = next((line for line in wanted if re.match(rf"{re.escape(name)}(?![\w-])", line)), name)  # with its versions
    install = f"python -m pip install {shlex.quote(known)}"
    return f"{needed_by} needs the package {name}, which is not installed here: {install}"
