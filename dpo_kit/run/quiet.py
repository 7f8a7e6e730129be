"""Libraries speak to the log file; the terminal belongs to what its reader can act on."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)
SILENCE = 2.0  # seconds after which a phase says that it is at work
BETWEEN = 20.0  # seconds between two lines of a bar where there is no terminal
LOOK = 0.2  # seconds
SPINS = 100_000  # turns that a thread waits before it sleeps; alone as quick as OpenMP's own 300,000
CROWDED_SPINS = 3_000  # a fifth slower alone, and several times as quick in company (examples/benchmark/crowd.py)


def quiet_imports() -> None:
    """Before the libraries are imported: silence what they say while they are, have no bot convert pickles, and let
    threads that wait leave their cores to other programs.
    """
    share_cores()
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # asks for a package that only 4-bit inference uses


def share_cores() -> None:
    """Before torch is imported: let waiting threads sleep soon where others use over a quarter of the cores.

    A thread that spins keeps those from running that it waits for; a step takes many times as long. Fewer threads would
    help too, but add up in another order: no run could be repeated to the bit. What OMP_WAIT_POLICY or GOMP_SPINCOUNT
    says stays.
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


def quiet_libraries() -> None:
    """Silence progress bars and notices of the libraries below; their warnings go to the log file."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    if not logging.getLogger().handlers:  # from Python there is no log file
        transformers.utils.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    logging.captureWarnings(True)


@contextmanager
def phase(what: str) -> Iterator[None]:
    """What is done inside the block, said while it is at work and with its seconds at the end, if it takes any."""
    started = time.monotonic()
    timer = threading.Timer(SILENCE, log.info, (f"{what} …",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - started) > SILENCE:
        log.info("%s: %.0f s", what, seconds)


def bar(total: int, what: str, unit: str) -> tqdm[Any]:
    """A bar in a terminal; elsewhere, as in a log file, a line now and then of how far it is."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, leave=False, delay=SILENCE)
    shown = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left"
    # what a bar draws over itself, line by line
    lines: Any = SimpleNamespace(write=lambda text: text.strip() and sys.stderr.write(f"{text.strip()}\n"))
    return tqdm(total=total, desc=what, file=lines, mininterval=BETWEEN, bar_format=shown, leave=False, delay=SILENCE)
