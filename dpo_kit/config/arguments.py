"""What a schedule, peft's adapter and the quantisation take as arguments: names, types and bounds of their own."""

import re
from collections.abc import Iterator
from typing import Any

from dpo_kit.config.limits import SCHEDULES_BY_METRIC, checked_value, number_faults
from dpo_kit.config.settings import Model
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import did_you_mean


def argument_faults(trl: dict[str, Any], model: Model) -> Iterator[str]:
    """Why schedule, adapter or quantisation would refuse their arguments; those of types near theirs are made so."""
    yield from _schedule_faults(trl)
    if model.tuning != "full":
        yield from _lora_faults(model.lora)
    if model.tuning == "qlora":
        yield from _field_faults("model.quantization", model.quantization, load_schema()["quantization"])


def _field_faults(prefix: str, values: dict[str, Any], fields: dict[str, Any]) -> Iterator[str]:
    """Names that `fields` has not, and values of other types; what can be read as its type is so in `values` then."""
    for name, value in values.items():
        if name not in fields:
            meant = did_you_mean(name, fields, f"; there are {', '.join(fields) or 'none'}" if len(fields) < 20 else "")
            yield f"unknown key {prefix}.{name}{meant}"
        elif value is not None:
            values[name], faults = checked_value(f"{prefix}.{name}", value, fields[name])
            yield from faults or number_faults(f"{prefix}.", {name: values[name]})


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
    yield from _field_faults(key, {name: value for name, value in options.items() if name in takes}, takes)
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
    yield from _field_faults("model.lora", lora, load_schema()["lora"])
