"""What TRL's config classes, peft's adapter, the quantisation and transformers' schedules take, read from the installed
libraries; loaded where these are not the pinned ones. `python -m dpo_kit.config.derive_schema` rewrites trl_schema.json
after an upgrade.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import os
import types
import typing
from typing import Any

from dpo_kit.config.trl_schema import PINNED_FILE, Schema, installed_versions

CONFIG_CLASSES = (
    "trl.DPOConfig",
    "trl.KTOConfig",
    "trl.experimental.orpo.ORPOConfig",
    "trl.experimental.cpo.CPOConfig",
    "trl.experimental.online_dpo.OnlineDPOConfig",
)
# What TRL takes unchecked and says nowhere but in its trainers' code; test_config.py reads it there and compares.
COMPARED = {
    "loss_type": [
        "aot", "aot_unpaired", "apo_down", "apo_zero", "bco_pair", "discopop", "exo_pair", "hinge", "ipo", "nca_pair",
        "robust", "sft", "sigmoid", "sigmoid_norm", "sppo_hard",
    ],
    "f_divergence_type": ["alpha_divergence", "forward_kl", "js_divergence", "reverse_kl"],
}  # fmt: skip
# The losses whose formula reads `label_smoothing`; the others ignore it in silence.
SMOOTHED = {"DPOConfig": ["aot", "aot_unpaired", "exo_pair", "robust"], "CPOConfig": ["sigmoid", "simpo"]}


def pinned_schema() -> Schema:
    """What trl_schema.json holds: the installed TRL's, with the choices that only its code has."""
    schema = derive_schema()
    for name, choices in COMPARED.items():
        schema["classes"]["DPOConfig"]["fields"][name]["choices"] = choices
    return schema


def derive_schema() -> Schema:
    """Read the config dataclasses of the installed TRL, and what adapter, quantisation and schedules take (seconds)."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from peft import LoraConfig
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers import BitsAndBytesConfig, optimization

    classes: Schema = {}
    for path in CONFIG_CLASSES:
        module, name = path.rsplit(".", 1)
        fields = _describe_fields(getattr(importlib.import_module(module), name))
        classes[name] = {"path": path, "fields": fields, "smoothed_losses": SMOOTHED.get(name, [])}
    schedules: dict[str, Any] = {kind.value: by for kind, by in optimization.TYPE_TO_SCHEDULER_FUNCTION.items()}
    schedules |= {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": optimization.GreedyLR}  # they take any keyword
    schedules["constant_with_warmup"] = optimization.get_constant_schedule  # transformers leaves its keywords out
    return {
        "versions": installed_versions(),
        "classes": classes,
        "lora": _describe_fields(LoraConfig),
        "quantization": _describe_call(BitsAndBytesConfig),
        "schedules": {name: _describe_call(function) for name, function in schedules.items()},
    }


def _describe_call(function: Any) -> Schema:
    """The keywords of `function` beside those that transformers gives it."""
    given = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
    return {
        name: {
            "type": {bool: "bool", int: "float", float: "float", str: "str"}.get(type(of.default), "Any"),
            "default": None if of.default is of.empty else of.default,
            "required": of.default is of.empty,
        }
        for name, of in inspect.signature(function).parameters.items()
        if name not in given
    }


def _describe_fields(dataclass: type) -> Schema:
    hints = typing.get_type_hints(dataclass)
    described: Schema = {}
    for field in dataclasses.fields(dataclass):
        if not field.init:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if isinstance(default, enum.Enum) or dataclasses.is_dataclass(default):
            default = getattr(default, "value", None)  # of another config inside: nothing
        described[field.name] = {"type": _annotation(hints[field.name]), "default": default}
        if choices := field.metadata.get("choices") or _enum_values(hints[field.name]):
            described[field.name]["choices"] = list(choices)
    return described


def _annotation(hint: Any) -> str:
    """`hint` written with builtins only: enums are their strings, other classes `Any`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = dict.fromkeys(_annotation(part) for part in typing.get_args(hint))
        return "Any" if "Any" in parts else " | ".join(parts)
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "str"
    if (origin := typing.get_origin(hint)) in (dict, list):
        return f"{origin.__name__}[{', '.join(_annotation(part) for part in typing.get_args(hint))}]"
    return hint.__name__ if hint in (int, float, bool, str, dict, list) else "Any"


def _enum_values(hint: Any) -> list[str]:
    parts = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return list(parts)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    return [str(member.value) for cls in enums for member in cls]


if __name__ == "__main__":
    PINNED_FILE.write_text(json.dumps(pinned_schema(), indent=1, sort_keys=True) + "\n")
