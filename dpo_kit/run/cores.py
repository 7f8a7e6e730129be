"""What other programs leave of the processor's cores, and how OpenMP's threads wait for each other there."""

from __future__ import annotations

import logging
import os
import sys

log = logging.getLogger(__name__)
LOOK = 0.2  # seconds
SPINS = 100_000  # turns that a thread waits before it sleeps; alone as quick as OpenMP's own 300,000
CROWDED_SPINS = 3_000  # a fifth slower alone, and several times as quick in company (examples/benchmark/crowd.py)


def share_cores() -> None:
    """Before torch is imported: let waiting threads sleep soon where others use over a quarter of the cores.

    A thread that spins keeps those from running that it waits for, and a step takes many times as long. Fewer threads
    would help as well, but add up in another order: a run could not be repeated to the bit. Whatever OMP_WAIT_POLICY or
    GOMP_SPINCOUNT says stays.
    """
    if "torch" in sys.modules or os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        return
    cores, used = used_cores()
    crowded = used > cores / 4
    os.environ["GOMP_SPINCOUNT"] = str(CROWDED_SPINS if crowded else SPINS)
    if crowded:
        log.info("other programs use %.1f of %d cores: threads that wait leave theirs to them", used, cores)


def used_cores() -> tuple[int, float]:
    """Cores that this process may use, and how many of them other programs are using."""
    import psutil

    each = psutil.cpu_times_percent(interval=LOOK, percpu=True)
    allowed = psutil.Process().cpu_affinity() if psutil.LINUX else range(len(each))
    idle = sum(each[core].idle + getattr(each[core], "iowait", 0) for core in allowed) / 100
    return len(allowed), len(allowed) - idle
