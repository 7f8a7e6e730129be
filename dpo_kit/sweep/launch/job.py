"""A job of a sweep: its file, its devices, and its process, which runs `-m dpo_kit.sweep.launch.job FILE`."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from hydra.core.utils import JobRuntime, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dpo_kit.config.compose import register
from dpo_kit.errors import ConfigError
from dpo_kit.run.lock import is_alive, read_holder
from dpo_kit.run.redact import redact_text

INTERRUPTED, TERMINATED = 130, 143
POLL_SECONDS = 0.1
PRELOAD = ["dpo_kit.sweep.launch.warm"]
log = logging.getLogger(__name__)
Process = subprocess.Popen[bytes] | ForkServerProcess  # the leader of its own process group


class JobFile(NamedTuple):
    """What a job needs in order to run in any process: the task (pickled by its name), its config, who waits for it."""

    task: TaskFunction
    cfg: DictConfig
    context: HydraContext
    name: str
    parent: int
    grace: float  # seconds to save and end, once it was told to
    threads: int | None = None  # of torch; None: as many as it takes


def answer_path(path: Path) -> Path:
    """Where the job of the file at `path` leaves how its task ended: (return value, error in one line or None)."""
    return path.with_suffix(".answer")


def run_file(path: Path) -> int:
    """Run the job of a file, leave its answer beside it; returns the exit code."""
    job: JobFile = pickle.loads(path.read_bytes())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_sweep, args=(job.parent, job.grace), daemon=True).start()
    try:
        wait_for_writer(path.parent, job.grace)  # left by a sweep that was killed, and about to save and end
        register()
        setup_globals()
        JobRuntime.instance().set("name", job.name)
        if job.threads is not None:
            import torch

            torch.set_num_threads(job.threads)
        place: dict[str, Any] = {"job_dir_key": "hydra.sweep.dir", "job_subdir_key": "hydra.sweep.subdir"}
        returned = run_job(task_function=job.task, config=job.cfg, hydra_context=job.context, **place)
        value, error = returned._return_value, None  # the public property would raise an error
        if returned.status is not JobStatus.COMPLETED:
            sys.stderr.write(redact_text("".join(traceback.format_exception(value))))
            value, error = None, redact_text(f"{type(value).__name__}: {value}".splitlines()[0])
        if os.environ.get("RANK", "0") == "0":
            answer_path(path).write_bytes(pickle.dumps((value, error)))
    except KeyboardInterrupt:
        sys.stderr.write("dpo_kit: interrupted\n")
        return INTERRUPTED
    return 0 if error is None else 1


def wait_for_writer(directory: Path, seconds: float) -> None:
    """Let a writer of `directory` that is about to end do so, as a job whose sweep was killed; at most `seconds`."""
    until, noted = time.monotonic() + seconds, False
    while time.monotonic() < until and (holder := read_holder(directory)) and is_alive(holder):
        if not noted:
            log.info("waiting for process %s, which still writes %s", holder.pid, directory)
        noted = True
        time.sleep(POLL_SECONDS)


def _end_with_sweep(parent: int, grace: float) -> None:
    """A sweep that was killed takes its jobs along: no second start may find one still writing."""
    if forked_by := multiprocessing.parent_process():
        forked_by.join()
    else:
        above = os.getppid()  # changes at once; `parent`, further up under a launcher, may stay a zombie for a while
        while os.getppid() == above and psutil.pid_exists(parent):
            time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def visible_devices() -> list[str]:
    """The GPUs that a job could see, as CUDA_VISIBLE_DEVICES names them; [] on a machine without."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def device_slots(devices: Sequence[str], per_job: int, jobs: int | None) -> list[str]:
    """One entry per job that may run at a time: its value of CUDA_VISIBLE_DEVICES, "" on a machine without GPU."""
    if per_job < 1 or (jobs is not None and jobs < 1):
        raise ConfigError(f"hydra.launcher.jobs and .devices_per_job must be at least 1, got {jobs} and {per_job}")
    if not devices:
        return [""] * (jobs or 1)
    if per_job > len(devices):
        raise ConfigError(f"hydra.launcher.devices_per_job must be at most {len(devices)} here, got {per_job}")
    return [",".join(devices[i : i + per_job]) for i in range(0, len(devices) - per_job + 1, per_job)][:jobs]


def start(
    file: Path, log: Path, environment: Mapping[str, str], devices: Sequence[str], command: Sequence[str]
) -> Process:
    """Run the job of `file`, its output to `log`: forked from a server that has imported all that a run needs, so that
    the second job starts at once. A process that has initialised CUDA must not be forked, nor one of macOS: there, in a
    new interpreter; `command` stands in the place of `python`, such as torchrun or accelerate launch.
    """
    if not devices and not command and sys.platform.startswith("linux"):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=_run_forked, args=(file, log, dict(environment)), daemon=False)
        process.start()
        return process
    words = list(command) or [sys.executable]
    if shutil.which(words[0]) is None:  # an environment that was not activated has its programs beside its interpreter
        beside = Path(sys.executable).with_name(words[0])
        words[0] = str(beside) if beside.exists() else words[0]
    words += ["-m", "dpo_kit.sweep.launch.job", str(file)]
    own: dict[str, Any] = {"env": os.environ | environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    with log.open("ab") as output:
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, **own)


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


def exit_code(process: Process) -> int | None:
    """Negative for a signal; None while it runs."""
    return process.exitcode if isinstance(process, ForkServerProcess) else process.poll()


def send(process: Process, number: signal.Signals) -> None:
    """A signal to a job and to all that it started."""
    pid = int(process.pid or 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has not made its own group yet
            if exit_code(process) is None:
                os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(run_file(Path(sys.argv[1])))
