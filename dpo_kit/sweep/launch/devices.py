"""Device slots: what one job of a sweep may use. Standard library only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from dpo_kit.errors import ConfigError


def visible_devices() -> list[str]:
    """The GPUs that a job could see, as CUDA_VISIBLE_DEVICES names them; [] on a machine without."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


def device_slots(devices: Sequence[str], per_job: int, jobs: int | None) -> list[str]:
    """One entry per job that may run at a time: its value of CUDA_VISIBLE_DEVICES, "" on a machine without GPU."""
    if per_job < 1 or (jobs is not None and jobs < 1):
        raise ConfigError(f"hydra.launcher.jobs and .devices_per_job must be at least 1, got {jobs} and {per_job}")
    if not devices:
        return [""] * (jobs or 1)
    if per_job > len(devices):
        raise ConfigError(f"hydra.launcher.devices_per_job must be at most {len(devices)} here, got {per_job}")
    whole = len(devices) // per_job * per_job
    return [",".join(devices[i : i + per_job]) for i in range(0, whole, per_job)][:jobs]
