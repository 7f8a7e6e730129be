"""`python -m dpo_kit.config.derive_schema` writes trl_schema.json anew from the installed libraries."""

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
from dpo_kit.run.files import read_json

BY_HAND = ("loss_type", "f_divergence_type")
"""Fields of DPOConfig whose choices TRL says nowhere but in its trainers' code, as it does which losses read
`label_smoothing` (the others ignore it in silence): written by hand into trl_schema.json; test_config.py compares."""


def pinned_schema() -> Schema:
    """What trl_schema.json holds: the installed TRL's, with the choices that only its code has."""
    schema, pinned = derive_schema(), read_json(PINNED_FILE)
    fields, stated = (of["classes"]["DPOConfig"]["fields"] for of in (schema, pinned))
    for name in BY_HAND:
        fields[name]["choices"] = stated[name]["choices"]
    return schema


def derive_schema() -> Schema:
    """Read the config dataclasses of the installed TRL, and what adapter, quantisation and schedules take (seconds)."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from peft import LoraConfig
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers import BitsAndBytesConfig, optimization

    classes: Schema = {}
    for name, stated in read_json(PINNED_FILE)["classes"].items():
        module = importlib.import_module(stated["path"].removesuffix(f".{name}"))
        classes[name] = stated | {"fields": _describe_fields(getattr(module, name))}
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
    hints, described = typing.get_type_hints(dataclass), Schema()
    for field in dataclasses.fields(dataclass):
        if not field.init:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if isinstance(default, enum.Enum) or dataclasses.is_dataclass(default):
            default = getattr(default, "value", None)  # of another config inside: nothing
        hint = hints[field.name]
        described[field.name] = {"type": _annotation(hint), "default": default}
        parts = typing.get_args(hint) or (hint,)
        enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
        stated = (
            parts if typing.get_origin(hint) is typing.Literal else [str(each.value) for it in enums for each in it]
        )
        if choices := list(field.metadata.get("choices") or stated):
            described[field.name]["choices"] = choices
    return described


def _annotation(hint: Any) -> str:
    """`hint` written with builtins only: enums are their strings, other classes `Any`."""
    origin, parts = typing.get_origin(hint), [_annotation(part) for part in typing.get_args(hint)]
    if origin in (typing.Union, types.UnionType):
        return "Any" if "Any" in parts else " | ".join(dict.fromkeys(parts))
    if origin in (dict, list):
        return f"{origin.__name__}[{', '.join(parts)}]"
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "str"
    return hint.__name__ if hint in (int, float, bool, str, dict, list) else "Any"


if __name__ == "__main__":
    PINNED_FILE.write_text(json.dumps(pinned_schema(), indent=1, sort_keys=True) + "\n")
