"""What TRL's config classes accept, as plain data: the `trl` block is composed and checked without importing TRL; also
what peft's adapter, the quantisation and transformers' schedules take.

The file trl_schema.json beside this module holds the pinned libraries' fields; `python -m dpo_kit.config.trl_schema`
rewrites it after an upgrade. Under others of the allowed range the installed ones are read once and kept in the user's
cache, so that their own fields count.
"""

import dataclasses
import enum
import importlib
import inspect
import json
import os
import types
import typing
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_kit.run.files import cache_folder, read_json, write_text

PINNED_FILE = Path(__file__).with_name("trl_schema.json")
Schema = dict[str, Any]
BY_HAND = ("loss_type", "f_divergence_type")
"""Fields of DPOConfig whose choices TRL says nowhere but in its trainers' code, as it does which losses read
`label_smoothing` (the others ignore it in silence): written by hand into trl_schema.json; test_config.py compares."""


@cache
def load_schema() -> Schema:
    """The installed TRL's config classes: `{"versions": …, "classes": {name: {"path": …, "fields": {field: …}}}}`, and
    {field: …} of "lora", "quantization" and each of "schedules".

    A field has `type` (a Python annotation of builtins), `default`, and `choices` where TRL states or tests them.
    """
    pinned, versions = read_json(PINNED_FILE), installed_versions()
    if pinned["versions"] == versions:
        return pinned
    file = cache_folder("trl_schema") / ("-".join(versions.values()) + ".json")
    if not file.exists():
        write_text(file, json.dumps(derive_schema()))
    return read_json(file)


def installed_versions() -> dict[str, str]:
    """The versions that decide which fields exist."""
    return {name: version(name) for name in ("trl", "transformers", "peft")}


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
