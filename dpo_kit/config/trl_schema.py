"""What TRL's config classes accept, as plain data: the `trl` block is composed and checked without importing TRL; also
what peft's adapter, the quantisation and transformers' schedules take.

The file trl_schema.json beside this module holds the pinned TRL's fields. Under another TRL of the allowed range the
installed one is read once and kept in the user's cache, so that its own fields count, not those of the pinned one.
`python -m dpo_kit.config.trl_schema` rewrites the file after an upgrade.
"""

from __future__ import annotations

import ast
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

from dpo_kit.run.files import cache_folder

CONFIG_CLASSES = (
    "trl.DPOConfig",
    "trl.KTOConfig",
    "trl.experimental.orpo.ORPOConfig",
    "trl.experimental.cpo.CPOConfig",
    "trl.experimental.online_dpo.OnlineDPOConfig",
)
TESTED_BY_NAME = ("loss_type", "f_divergence_type")  # strings that TRL takes unchecked and compares in the trainer
PINNED_FILE = Path(__file__).with_name("trl_schema.json")

Schema = dict[str, Any]


@cache
def load_schema() -> Schema:
    """The installed TRL's config classes: `{"versions": …, "classes": {name: {"path": …, "fields": {field: …}}}}`, and
    {field: …} of "lora", "quantization" and each of "schedules".

    A field has `type` (a Python annotation of builtins), `default`, and `choices` where TRL states or tests them.
    """
    pinned = json.loads(PINNED_FILE.read_text())
    versions = installed_versions()
    if pinned["versions"] == versions:
        return pinned
    return _cached_schema(versions)


def installed_versions() -> dict[str, str]:
    """The versions that decide which fields exist."""
    return {name: version(name) for name in ("trl", "transformers", "peft")}


def _cached_schema(versions: dict[str, str]) -> Schema:
    file = cache_folder("trl_schema") / ("-".join(versions.values()) + ".json")
    if file.exists():
        return json.loads(file.read_text())
    schema = derive_schema()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(schema))
    partial.replace(file)
    return schema


def derive_schema() -> Schema:
    """Read the config dataclasses of the installed TRL (imports it: seconds)."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    classes = {path.rsplit(".", 1)[1]: _describe_class(path) for path in CONFIG_CLASSES}
    return {"versions": installed_versions(), "classes": classes, **_describe_others()}


def _describe_others() -> Schema:
    """What the adapter, the quantisation and each learning-rate schedule take, in the form of a class's fields."""
    from peft import LoraConfig
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers import BitsAndBytesConfig, optimization

    hints = typing.get_type_hints(LoraConfig)
    schedules: dict[str, Any] = {kind.value: by for kind, by in optimization.TYPE_TO_SCHEDULER_FUNCTION.items()}
    schedules |= {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": optimization.GreedyLR}  # they take any keyword
    schedules["constant_with_warmup"] = optimization.get_constant_schedule  # transformers leaves its keywords out
    return {
        "lora": {f.name: _describe_field(f, hints[f.name], {}) for f in dataclasses.fields(LoraConfig)},
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


def _describe_class(path: str) -> dict[str, Any]:
    module, name = path.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    hints = typing.get_type_hints(cls)
    tested = _tested_strings(cls)
    fields = {f.name: _describe_field(f, hints[f.name], tested) for f in dataclasses.fields(cls) if f.init}
    return {"path": path, "fields": fields, "smoothed_losses": _smoothed_losses(cls)}


def _describe_field(field: dataclasses.Field, hint: Any, tested: dict[str, set[str]]) -> dict[str, Any]:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = (
        default.value if isinstance(default, enum.Enum) else None if dataclasses.is_dataclass(default) else default
    )
    described = {"type": _annotation(hint), "default": default}
    choices = field.metadata.get("choices") or _enum_values(hint) or sorted(tested.get(field.name, ()))
    return described | ({"choices": list(choices)} if choices else {})


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


def _tested_strings(config_class: type) -> dict[str, set[str]]:
    """Which strings TRL's code compares a field with, for the fields whose valid values it states nowhere else."""
    tested: dict[str, set[str]] = {name: set() for name in TESTED_BY_NAME}
    for node in _source_nodes(config_class):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            tested.get(_name(node.left) or "", set()).update(_constants(node))
    return tested


def _smoothed_losses(config_class: type) -> list[str]:
    """The losses whose formula reads `label_smoothing`; the others ignore it in silence."""
    branches = [n for n in _source_nodes(config_class) if isinstance(n, ast.If) and isinstance(n.test, ast.Compare)]
    losses: set[str] = set()
    for branch in branches:
        test = typing.cast(ast.Compare, branch.test)
        if _name(test.left) == "loss_type" and isinstance(test.ops[0], ast.Eq):
            body = [node for statement in branch.body for node in ast.walk(statement)]
            formula = any(_name(node) == "logsigmoid" for node in body)
            if formula and any(_name(node) == "label_smoothing" for node in body):
                losses |= _constants(test)
    return sorted(losses)


def _source_nodes(config_class: type) -> list[ast.AST]:
    names = (config_class.__module__, config_class.__module__.replace("_config", "_trainer"))
    files = [typing.cast(str, importlib.import_module(name).__file__) for name in names]
    return [node for file in files for node in ast.walk(ast.parse(Path(file).read_text()))]


def _constants(node: ast.Compare) -> set[str]:
    return {c.value for c in node.comparators if isinstance(c, ast.Constant) and isinstance(c.value, str)}


def _name(node: ast.AST) -> str | None:
    return getattr(node, "attr", None) or getattr(node, "id", None)


if __name__ == "__main__":
    PINNED_FILE.write_text(json.dumps(derive_schema(), indent=1, sort_keys=True) + "\n")
