"""One job of a sweep: the file that describes it, and the process that runs it (`-m dpo_kit.sweep.launch.job FILE`)."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import psutil
from hydra.core.utils import JobRuntime, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dpo_kit.config.compose import register
from dpo_kit.run.lock import wait_for_writer
from dpo_kit.run.redact import redact_text

INTERRUPTED, TERMINATED = 130, 143


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
        returned = run_job(
            hydra_context=job.context,
            task_function=job.task,
            config=job.cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
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


if __name__ == "__main__":
    sys.exit(run_file(Path(sys.argv[1])))
