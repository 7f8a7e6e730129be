"""What this machine can do, and the TRL arguments that follow; each is only chosen where the user left it open."""

from typing import Any

import psutil
import torch

WIDE = 256  # hidden size from which bf16 pays on CPUs that multiply it; in narrower models the casts cost more
ROOM = 0.8  # of the free memory that is planned with: estimates are up to a fifth too low


def training_precision(width: int = 0) -> str:
    """bf16 where the accelerator has it, fp16 on older ones; on a CPU bf16 where it has instructions for it and the
    model's hidden size, `width`, is large enough, else fp32.
    """
    if has_accelerator():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if width >= WIDE and (able.get("avx512_bf16") or able.get("amx_bf16")) else "float32"


def has_accelerator() -> bool:
    return torch.cuda.is_available()


def device_name() -> str:
    """What training runs on, as results depend on it to the last bit."""
    return torch.cuda.get_device_name() if has_accelerator() else "cpu"


def free_memory() -> int:
    """Bytes that are free on the accelerator, or on this machine where there is none."""
    return torch.cuda.mem_get_info()[0] if has_accelerator() else psutil.virtual_memory().available


def precision_arguments(trl: dict[str, Any], width: int) -> dict[str, bool]:
    """`bf16`, `fp16` and `use_cpu` for the fields that are null in `trl`; `width` is the model's hidden size."""
    use_cpu = trl["use_cpu"] if trl["use_cpu"] is not None else not has_accelerator()
    precision = "float32" if use_cpu and has_accelerator() else training_precision(width)
    chosen = {
        "use_cpu": use_cpu,
        "bf16": precision == "bfloat16" and not trl["fp16"],
        "fp16": precision == "float16" and not trl["bf16"],
    }
    return {key: value for key, value in chosen.items() if trl[key] is None or (key == "fp16" and value)}


def weight_dtype(dtype: str, tuning: str) -> torch.dtype:
    """The dtype that weights are loaded in: fp32 for full tuning, since bf16 rounds updates of the usual size away."""
    if dtype == "auto":
        dtype = "float32" if tuning == "full" else training_precision()
    return getattr(torch, dtype)
