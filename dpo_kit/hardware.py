"""What this machine can do, and the TRL arguments that follow; each is only chosen where the user left it open."""

from __future__ import annotations

from typing import Any, Literal

import torch

Precision = Literal["bfloat16", "float16", "float32"]


def training_precision() -> Precision:
    """bf16 where the accelerator has it, fp16 on older ones, fp32 on a CPU (where TRL's own default fails)."""
    if not has_accelerator():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def has_accelerator() -> bool:
    return torch.cuda.is_available()


def device_name() -> str:
    """What training runs on, as results depend on it to the last bit."""
    return torch.cuda.get_device_name() if has_accelerator() else "cpu"


def precision_arguments(trl: dict[str, Any]) -> dict[str, bool]:
    """`bf16`, `fp16`, `use_cpu` and `gradient_checkpointing` for the fields that are null in `trl`."""
    use_cpu = trl["use_cpu"] if trl["use_cpu"] is not None else not has_accelerator()
    precision: Precision = "float32" if use_cpu else training_precision()
    chosen = {
        "use_cpu": use_cpu,
        "bf16": precision == "bfloat16" and not trl["fp16"],
        "fp16": precision == "float16" and not trl["bf16"],
        "gradient_checkpointing": False,
    }
    return {key: value for key, value in chosen.items() if trl[key] is None or (key == "fp16" and value)}


def weight_dtype(dtype: str, tuning: str) -> torch.dtype:
    """The dtype that weights are loaded in: fp32 for full tuning, since bf16 rounds updates of the usual size away."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.float32 if tuning == "full" else getattr(torch, training_precision())
