"""What the libraries below would refuse only after a model is loaded, said while the config is checked. No torch."""

import importlib.metadata
import importlib.util
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Union

import pydantic

from dpo_kit.config.settings import Settings
from dpo_kit.config.trl_schema import load_schema

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
WITHOUT_ARGUMENTS = ("constant", "linear", "cosine")  # schedules that need none
SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
OURS = ("probe/", "gold/", "custom/")  # how measures begin that TRL's evaluation has not
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
    if model.tuning != "full" or trl["lr_scheduler_kwargs"] or trl["lr_scheduler_type"] not in WITHOUT_ARGUMENTS:
        from dpo_kit.config.arguments import argument_faults

        yield from argument_faults(trl, model)
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
    if not (wrong := [item for item in items if "choices" in field and item not in field["choices"]]):
        return value, []
    from dpo_kit.config.explain import wrong_choice

    return value, [wrong_choice(key, item, field["choices"]) for item in wrong]


def _type(annotation: str) -> Any:
    """The type that trl_schema.py writes as `annotation`: builtins, lists and dicts of them, joined by |."""
    if len(parts := annotation.split(" | ")) > 1:
        return Union[tuple(map(_type, parts))]  # noqa: UP007 - of types that are known only here
    outer, _, inner = annotation.removesuffix("]").partition("[")
    known = TYPES.get(outer, Any)
    return known[tuple(map(_type, inner.split(", ", 1)))] if inner else known


def needs_trl_evaluation(settings: Settings) -> bool:
    """Whether TRL's own evaluation runs beside the probe's: for a measure that it alone has, or where nothing else is
    measured. Its trainer that draws answers has no loss for given ones, and fails in it.
    """
    wanted, trl = settings.callbacks, settings.trl
    if settings.method.rows == "prompts":
        return False
    if wanted.eval_loss != "auto":
        return wanted.eval_loss
    if not (wanted.scores_rows or wanted.kl_drift):
        return True
    chooses = trl["load_best_model_at_end"] or trl["lr_scheduler_type"] in SCHEDULES_BY_METRIC
    metric = str(trl["metric_for_best_model"] or ("loss" if chooses else "")).removeprefix("eval_")
    return bool(metric) and not metric.startswith(OURS)


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
