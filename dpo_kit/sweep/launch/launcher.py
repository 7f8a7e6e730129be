"""Run the jobs of a sweep, each in its own process: none can stop another, and a second start does what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from dpo_kit.config.compose import check, without_hydra
from dpo_kit.config.identity import refuse_other_run
from dpo_kit.errors import ConfigError, SweepError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.lock import only_writer
from dpo_kit.sweep.launch.devices import device_slots, visible_devices
from dpo_kit.sweep.launch.job import INTERRUPTED, TERMINATED, JobFile, answer_path, read_answer
from dpo_kit.sweep.launch.live_table import View, near, open_view
from dpo_kit.sweep.launch.record import LOG, JobRecord, State, read_jobs, write_jobs
from dpo_kit.sweep.launch.starters import Process, Starter, choose_starter, send
from dpo_kit.sweep.summary import refresh

POLL_SECONDS = 0.1
OBJECTIVE = "probe/accuracy"
log = logging.getLogger("dpo_kit.sweep")


class Face(Protocol):
    """What Hydra's side of the launcher holds."""

    options: dict[str, Any]
    hydra_context: HydraContext | None
    task_function: TaskFunction | None
    config: DictConfig | None


@dataclasses.dataclass
class Job:
    """A job while this process cares for it."""

    record: JobRecord
    cfg: DictConfig
    directory: Path
    value: Any = None

    @property
    def file(self) -> Path:
        return self.directory / ".job"

    def returned(self, error: SweepError) -> JobReturn:
        """What Hydra's sweepers expect; `error` stands for a job that did not end well."""
        kind = JobReturn if self.record.state == "done" else FailedReturn
        answer = kind(overrides=self.record.overrides, cfg=without_hydra(self.cfg), working_dir=str(self.directory))
        answer.status = JobStatus.COMPLETED if self.record.state == "done" else JobStatus.FAILED
        answer.return_value = self.value if self.record.state == "done" else error
        return answer


class FailedReturn(JobReturn):
    """Raises its error when asked for its value, without Hydra's own line on the terminal: ours says more."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


@dataclasses.dataclass
class Running:
    """A job with its process; times are of the monotonic clock."""

    job: Job
    process: Process
    slot: str
    started: float
    deadline: float | None
    kill_at: float | None = None


def launch(face: Face, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
    """Run every job that is not done yet; the return values of all, in order. Raises ConfigError."""
    assert face.config is not None and face.hydra_context is not None and face.task_function is not None
    setup_globals()
    configure_log(face.config.hydra.hydra_logging, face.config.hydra.verbose)
    sweep_dir = Path(str(face.config.hydra.sweep.dir)).absolute()
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(sweep_dir):
        jobs = [compose_job(face, list(words), first + i, sweep_dir) for i, words in enumerate(job_overrides)]
        refuse_shared_directories(jobs)
        sweep = Sweep(sweep_dir, jobs, face, earlier=read_jobs(sweep_dir)[:first])
        sweep.run()
    error = describe_failures(sweep_dir, jobs)
    return [job.returned(error) for job in jobs]


def compose_job(face: Face, overrides: list[str], number: int, sweep_dir: Path) -> Job:
    """Job `number` with its config, and where it will write."""
    assert face.config is not None and face.hydra_context is not None
    cfg = face.hydra_context.config_loader.load_sweep_config(face.config, overrides)
    with open_dict(cfg):
        cfg.hydra.job.id = f"{cfg.hydra.job.name}_{number}"
        cfg.hydra.job.num = number
    HydraConfig.instance().set_config(cfg)  # the name of the directory may ask for it
    subdir = str(cfg.hydra.sweep.subdir)
    said = {key: OmegaConf.select(cfg, path) for key, path in (("method", "method.name"), ("beta", "beta"))}
    record = JobRecord(number, subdir, overrides, **said, seed=OmegaConf.select(cfg, "seed"), log=f"{subdir}/{LOG}")
    return Job(record, cfg, sweep_dir / subdir)


def refuse_shared_directories(jobs: Sequence[Job]) -> None:
    """ConfigError where two jobs would write into one directory."""
    by_directory: dict[Path, Job] = {}
    for job in jobs:
        if other := by_directory.get(job.directory):
            raise ConfigError(
                f"hydra.sweep.subdir must differ between jobs, got {job.record.dir} for both "
                f"{' '.join(job.record.overrides)} and {' '.join(other.record.overrides)}: name in it what is swept"
            )
        by_directory[job.directory] = job


def is_done(job: Job) -> bool:
    """Whether the directory of `job` holds its finished run; then its value is that run's."""
    run = RunDirectory(job.directory)
    ended = run.read_result()
    if not ended or ended.get("status") != "done":
        return False
    try:
        refuse_other_run(run, check(without_hydra(job.cfg)))
    except ConfigError:  # a run of another config: the job itself will say which keys differ
        return False
    job.value = (ended.get("final") or {}).get(OBJECTIVE)
    return True


def describe_failures(sweep_dir: Path, jobs: Sequence[Job]) -> SweepError:
    """The error that names every job which did not end well, with its log."""
    failed = [job.record for job in jobs if job.record.state != "done"]
    lines = [f"  job {r.number} {r.state}: {r.error}\n    log: {near(sweep_dir / r.log)}" for r in failed]
    head = f"{len(failed)} of {len(jobs)} jobs did not end well; the same command runs them again, and only them"
    return SweepError("\n".join([head, *lines]))


def threads_per_job(jobs: int) -> int | None:
    """Jobs that share a processor slow each other down unless they share its cores; None: no need, or said already."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, (os.cpu_count() or 1) // jobs)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end: one that lands in a finaliser or callback of a library would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Sweep:
    """Jobs waiting, running and ended; one thread, which looks at all of them ten times a second."""

    def __init__(
        self,
        sweep_dir: Path,
        jobs: Sequence[Job],
        face: Face,
        *,
        earlier: list[dict[str, Any]],
        on_change: Callable[[Path], None] = refresh,
    ) -> None:
        options = face.options
        devices = options["devices"] if options["devices"] is not None else visible_devices()
        self.sweep_dir, self.jobs, self.face, self.earlier, self.on_change = sweep_dir, jobs, face, earlier, on_change
        self.free = device_slots(list(devices), options["devices_per_job"], options["jobs"])
        self.starter: Starter = choose_starter(list(devices), list(options["command"]))
        self.limit = options["timeout_minutes"] and 60 * options["timeout_minutes"]
        self.grace: float = options["grace_seconds"]
        self.threads = threads_per_job(len(self.free)) if not devices else None
        self.waiting: list[Job] = []
        self.running: list[Running] = []
        self.stale = False
        self.view: View | None = None

    def run(self) -> None:
        """Run until every job has ended; on Ctrl-C or SIGTERM the running ones are ended first."""
        self._sort_out_done()
        self.write()
        self.view = open_view(self.sweep_dir, [job.record for job in self.jobs])
        try:
            while self.waiting or self.running or self.stale:
                self._start_ready()
                if self.stale:  # after the next job has started: drawing takes a second or two
                    self.stale = False
                    with signals_deferred():
                        self.on_change(self.sweep_dir)
                self._look()
                self.view.tick()
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop()
            raise
        finally:
            self.view.close()

    def write(self) -> None:
        write_jobs(self.sweep_dir, self.earlier, [job.record for job in self.jobs])

    def _sort_out_done(self) -> None:
        took = {job["dir"]: job.get("seconds") for job in read_jobs(self.sweep_dir)}
        for job in self.jobs:
            if is_done(job):
                record = job.record
                record.state, record.before, record.exit_code, record.seconds = "done", True, 0, took.get(record.dir)
            else:
                self.waiting.append(job)
        self.stale = len(self.waiting) < len(self.jobs)

    def _start_ready(self) -> None:
        while self.waiting and self.free:
            job, slot = self.waiting.pop(0), self.free.pop(0)
            now = time.monotonic()
            deadline = now + self.limit if self.limit else None
            self.running.append(Running(job, self._start(job, slot), slot, now, deadline))
            self._change(job, "running")

    def _start(self, job: Job, slot: str) -> Process:
        assert self.face.task_function is not None and self.face.hydra_context is not None
        name = str(JobRuntime.instance().get("name"))
        file = JobFile(
            self.face.task_function, job.cfg, self.face.hydra_context, name, os.getpid(), self.grace, self.threads
        )
        file.write(job.file)
        environment = {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", self.sweep_dir.name)}
        environment |= {"CUDA_VISIBLE_DEVICES": slot} if slot else {}
        return self.starter(job.file, self.sweep_dir / job.record.log, environment)

    def _look(self) -> None:
        """Settle what has ended, end what is over its time."""
        now = time.monotonic()
        for one in list(self.running):
            code = one.process.poll()
            if code is not None:
                self._settle(one, code)
            elif one.kill_at is not None:
                if now > one.kill_at:
                    send(one.process, signal.SIGKILL)
            elif one.deadline is not None and now > one.deadline:
                send(one.process, signal.SIGINT)
                one.kill_at = now + self.grace

    def _settle(self, one: Running, code: int, *, stopped: bool = False) -> None:
        send(one.process, signal.SIGKILL)  # what it started and left behind
        self.running.remove(one)
        self.free.append(one.slot)
        job, answer = one.job, read_answer(one.job.file)
        job.record.exit_code, job.record.seconds = code, round(time.monotonic() - one.started, 1)
        if code == 0 and answer is not None and answer.error is None:
            job.value, state = answer.value, "done"
        else:
            state, job.record.error = self._verdict(one, code, answer.error if answer else None, stopped)
        for path in (job.file, answer_path(job.file)):
            path.unlink(missing_ok=True)
        self._change(job, state)  # type: ignore[arg-type]
        self.stale = True

    def _verdict(self, one: Running, code: int, error: str | None, stopped: bool) -> tuple[State, str]:
        """The state of a job that did not end well, and why, in one line."""
        if one.kill_at is not None:
            return "timed out", f"ran longer than {self.face.options['timeout_minutes']:g} minutes"
        if stopped or code in (INTERRUPTED, TERMINATED, -signal.SIGINT, -signal.SIGTERM):
            return "interrupted", "interrupted; goes on from its newest checkpoint"
        if error is not None:
            return "failed", error
        if code < 0:
            often = " (often: out of memory)" if code == -signal.SIGKILL else ""
            return "killed", f"ended by {signal.Signals(-code).name}{often}"
        return "failed", f"exited with code {code} before it was finished"

    def _change(self, job: Job, state: State) -> None:
        job.record.state = state
        self.write()
        if self.view is not None:
            self.view.changed(job.record)

    def _stop(self) -> None:
        """SIGINT to every job, so that it saves; SIGKILL to those still there after a grace, or at a second Ctrl-C."""
        for one in self.running:
            send(one.process, signal.SIGINT)
        until = time.monotonic() + self.grace
        try:
            while time.monotonic() < until and any(one.process.poll() is None for one in self.running):
                time.sleep(POLL_SECONDS)
        except (KeyboardInterrupt, SystemExit):
            log.info("ending the jobs at once")
        for one in list(self.running):
            send(one.process, signal.SIGKILL)
            while (code := one.process.poll()) is None:
                time.sleep(POLL_SECONDS)
            self._settle(one, code, stopped=True)
