"""Linear modules whose weights the code around them reads itself, past the module, as state-space mixers do: an adapter
there would not be trained, and 4-bit weights would not be read; and what 4-bit weights need. Loaded for adapters, 4-bit
weights and odd families alone.
"""

import functools
import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import get_keys_to_not_convert


def bypassed(model: nn.Module) -> list[str]:
    """The full names of such modules."""
    read = r"self\.{}\.weight(?!\w|\[|\.dtype|\.device|\.shape)"
    return [
        f"{name}.{child}"
        for name, parent in model.named_modules()
        for child, module in parent.named_children()
        if isinstance(module, nn.Linear) and re.search(read.format(child), _methods(type(parent)))  # type: ignore[arg-type]
    ]


def short_names(names: list[str]) -> set[str]:
    """The last two parts of each name, which all layers have in common."""
    return {".".join(name.split(".")[-2:]) for name in names}


def weightless(config: Any) -> Any:
    """A model of this config without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def kept_whole(config: Any) -> list[str] | None:
    """What of a model of this config is not to be quantised; None where transformers knows it by itself."""
    model = weightless(config)
    names = short_names(bypassed(model))
    return sorted({*names, *get_keys_to_not_convert(model)}) if names else None


@functools.cache
def _methods(kind: type) -> str:
    """The source of the methods of a class but its initialisation."""
    methods = (part for name, part in vars(kind).items() if inspect.isfunction(part) and "init" not in name)
    return "".join(map(inspect.getsource, methods))


def keep_4bit_weights_as_they_are(weights: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks them in place at the first evaluation: the rounded scales change
    training, and a width that is no multiple of the block size fails (bitsandbytes-foundation/bitsandbytes#1804).
    """
    from bitsandbytes.nn import Linear4bit

    for module in weights.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
