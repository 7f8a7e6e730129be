"""Which devices a job may use, and how its process is started (forked without GPU, fresh with one) and ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from dpo_kit.errors import ConfigError
from dpo_kit.sweep.launch.job import run_file

PRELOAD = ["dpo_kit.sweep.launch.warm"]


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


class Forked:
    """A job forked from the warm server, with what we use of `subprocess.Popen`."""

    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process
        self.pid = int(process.pid or 0)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode


Process = subprocess.Popen[bytes] | Forked  # the leader of its own process group
Starter = Callable[[Path, Path, Mapping[str, str]], Process]  # of a job file, its log, what its environment has more


def choose_starter(devices: Sequence[str], command: Sequence[str]) -> Starter:
    """Fork where that is safe: a process that has initialised CUDA must not be forked, nor one of macOS."""
    if devices or command or not sys.platform.startswith("linux"):
        return partial(start_fresh, command=command)
    return start_forked


def start_fresh(file: Path, log: Path, environment: Mapping[str, str], command: Sequence[str] = ()) -> Process:
    """A new interpreter; `command` stands in the place of `python`, such as torchrun or accelerate launch."""
    words = list(command) or [sys.executable]
    if shutil.which(words[0]) is None:  # an environment that was not activated has its programs beside its interpreter
        beside = Path(sys.executable).with_name(words[0])
        words[0] = str(beside) if beside.exists() else words[0]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*words, "-m", "dpo_kit.sweep.launch.job", str(file)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_forked(file: Path, log: Path, environment: Mapping[str, str]) -> Process:
    """A fork of a server that has imported all that a run needs: the second job starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run_forked, args=(file, log, dict(environment)), daemon=False)
    process.start()
    return Forked(process)


def _run_forked(file: Path, log: Path, environment: Mapping[str, str]) -> None:
    """What a fork does: its own group, its output to `log`, then the job."""
    os.setsid()
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment)
    sys.exit(run_file(file))


def send(process: Process, number: signal.Signals) -> None:
    """A signal to a job and to all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it has not made its own group yet
            if process.poll() is None:
                os.kill(process.pid, number)
