"""Run the jobs of a sweep, each in its own process: none can stop another, and a second start does what is missing."""

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from dpo_kit.config.compose import check, without_hydra
from dpo_kit.config.identity import refuse_other_run
from dpo_kit.errors import ConfigError, SweepError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import write_json
from dpo_kit.run.lock import only_writer
from dpo_kit.sweep.choice.runs import read_jobs
from dpo_kit.sweep.launch import job as jobs
from dpo_kit.sweep.launch.progress import Board, JobRecord, State, near
from dpo_kit.sweep.summary import refresh

OBJECTIVE = "probe/accuracy"
log = logging.getLogger("dpo_kit.sweep")


@dataclasses.dataclass
class Job:
    """A job while this process cares for it; times are of the monotonic clock."""

    record: JobRecord
    cfg: DictConfig
    directory: Path
    value: Any = None
    file: Path = dataclasses.field(init=False)  # this and the next three: once it has started
    process: jobs.Process = dataclasses.field(init=False)
    slot: str = dataclasses.field(init=False)
    started: float = dataclasses.field(init=False)
    kill_at: float | None = None

    def is_done(self) -> bool:
        """Whether its directory holds its finished run; then its value is that run's."""
        run = RunDirectory(self.directory)
        ended = run.read_result()
        if not ended or ended.get("status") != "done":
            return False
        try:
            refuse_other_run(run, check(without_hydra(self.cfg)))
        except ConfigError:  # a run of another config: the job itself will say which keys differ
            return False
        self.value = (ended.get("final") or {}).get(OBJECTIVE)
        return True

    def returned(self, error: SweepError) -> JobReturn:
        """What Hydra's sweepers expect; `error` stands for a job that did not end well."""
        place: dict[str, Any] = {"cfg": without_hydra(self.cfg), "working_dir": str(self.directory)}
        if self.record.state == "done":
            return JobReturn(self.record.overrides, **place, status=JobStatus.COMPLETED, _return_value=self.value)
        return FailedReturn(self.record.overrides, **place, status=JobStatus.FAILED, _return_value=error)


class FailedReturn(JobReturn):
    """Raises its error when asked for its value, without Hydra's own line on the terminal: ours says more."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def threads_per_job(jobs: int) -> int | None:
    """Jobs that share a processor slow each other down unless they share its cores; None: no need, or said already."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, (os.cpu_count() or 1) // jobs)


class Sweep:
    """Jobs waiting, running and ended; one thread, which looks at all of them ten times a second."""

    def __init__(self, options: dict[str, Any], config: DictConfig, context: HydraContext, task: TaskFunction) -> None:
        self.options, self.config, self.context, self.task = options, config, context, task
        self.sweep_dir = Path(str(config.hydra.sweep.dir)).absolute()
        self.devices = list(jobs.visible_devices() if options["devices"] is None else options["devices"])
        self.free = jobs.device_slots(self.devices, options["devices_per_job"], options["jobs"])
        self.threads = threads_per_job(len(self.free)) if not self.devices else None
        self.jobs: list[Job] = []
        self.earlier: list[dict[str, Any]] = []  # jobs of earlier batches, as sweep.json has them
        self.summary_is_old = False

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        """Run every job that is not done yet; the return values of all, in order. Raises ConfigError."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        with only_writer(self.sweep_dir):
            for number, words in enumerate(job_overrides, start=first):
                job = self.compose(list(words), number)
                if others := [other for other in self.jobs if other.directory == job.directory]:
                    both = " and ".join(" ".join(each.record.overrides) for each in (job, *others))
                    raise ConfigError(
                        f"hydra.sweep.subdir must differ between jobs, got {job.record.dir} for both {both}: name in "
                        "it what is swept"
                    )
                self.jobs.append(job)
            self.run(first)
        failed = [job.record for job in self.jobs if job.record.state != "done"]
        lines = [f"  job {r.number} {r.state}: {r.error}\n    log: {near(self.sweep_dir / r.log)}" for r in failed]
        head = f"{len(failed)} of {len(self.jobs)} jobs did not end well"
        error = SweepError("\n".join([f"{head}; the same command runs them again, and only them", *lines]))
        return [job.returned(error) for job in self.jobs]

    def compose(self, overrides: list[str], number: int) -> Job:
        """Job `number` with its config, and where it will write."""
        cfg = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(cfg):
            cfg.hydra.job.id = f"{cfg.hydra.job.name}_{number}"
            cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)  # the name of the directory may ask for it
        subdir = str(cfg.hydra.sweep.subdir)
        method, beta, seed = (OmegaConf.select(cfg, key) for key in ("method.name", "beta", "seed"))
        record = JobRecord(number, subdir, overrides, method, beta, seed, log=f"{subdir}/job.log")
        return Job(record, cfg, self.sweep_dir / subdir)

    def run(self, first: int) -> None:
        """Run until every job has ended; on Ctrl-C or SIGTERM the running ones are ended first."""
        recorded = read_jobs(self.sweep_dir)
        self.earlier, seconds = recorded[:first], {job["dir"]: job.get("seconds") for job in recorded}
        for job in self.jobs:
            if job.is_done():
                job.record.state, job.record.before, job.record.exit_code = "done", True, 0
                job.record.seconds = seconds.get(job.record.dir)
                self.summary_is_old = True
        self._write()
        self.board = Board(self.sweep_dir, [job.record for job in self.jobs], Console())
        try:
            while (waiting := self._all("waiting")) or self._all("running") or self.summary_is_old:
                for job, slot in zip(waiting, list(self.free), strict=False):
                    self._start(job, slot)
                if self.summary_is_old:  # after the next job has started: drawing takes a second or two
                    self.summary_is_old = False
                    # an interrupt that lands in a finaliser or callback of a library would be lost: both wait
                    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
                    refresh(self.sweep_dir)  # raises nothing
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                now, minutes = time.monotonic(), self.options["timeout_minutes"]
                for job in self._all("running"):  # settle what has ended, end what is over its time
                    code = jobs.exit_code(job.process)
                    if code is not None:
                        self._settle(job, code)
                    elif job.kill_at is not None and now > job.kill_at:
                        jobs.send(job.process, signal.SIGKILL)
                    elif job.kill_at is None and minutes and now > job.started + 60 * minutes:
                        jobs.send(job.process, signal.SIGINT)
                        job.kill_at = now + self.options["grace_seconds"]
                self.board.tick()
                time.sleep(jobs.POLL_SECONDS)
        except BaseException:
            self._stop()
            raise
        finally:
            self.board.close()

    def _all(self, state: State) -> list[Job]:
        return [job for job in self.jobs if job.record.state == state]

    def _write(self) -> None:
        """sweep.json with the jobs of earlier batches (a sweeper that learns asks for several) and of this one."""
        records = [*self.earlier, *(dataclasses.asdict(job.record) for job in self.jobs)]
        write_json(self.sweep_dir / "sweep.json", {"jobs": records})

    def _change(self, job: Job, state: State) -> None:
        job.record.state = state
        self._write()
        self.board.changed(job.record)

    def _start(self, job: Job, slot: str) -> None:
        self.free.remove(slot)
        job.slot, job.started, job.file = slot, time.monotonic(), job.directory / ".job"
        name, grace = str(JobRuntime.instance().get("name")), self.options["grace_seconds"]
        file = jobs.JobFile(self.task, job.cfg, self.context, name, os.getpid(), grace, self.threads)
        job.directory.mkdir(parents=True, exist_ok=True)
        jobs.answer_path(job.file).unlink(missing_ok=True)  # of an earlier start
        job.file.write_bytes(pickle.dumps(file))
        environment = {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", self.sweep_dir.name)}
        environment |= {"CUDA_VISIBLE_DEVICES": job.slot} if job.slot else {}
        log_file, command = self.sweep_dir / job.record.log, self.options["command"]
        job.process = jobs.start(job.file, log_file, environment, self.devices, command)
        self._change(job, "running")

    def _settle(self, job: Job, code: int, *, stopped: bool = False) -> None:
        """Take in how `job` ended, with exit code `code`; `stopped`: it was told to end with the sweep."""
        jobs.send(job.process, signal.SIGKILL)  # what it started and left behind
        self.free.append(job.slot)
        record, error, answered = job.record, None, False
        state: State = "failed"
        record.exit_code, record.seconds = code, round(time.monotonic() - job.started, 1)
        with contextlib.suppress(Exception):  # half written, or of a class that is not here
            (job.value, error), answered = pickle.loads(jobs.answer_path(job.file).read_bytes()), True
        if code == 0 and answered and error is None:
            state = "done"
        elif job.kill_at is not None:
            state, record.error = "timed out", f"ran longer than {self.options['timeout_minutes']:g} minutes"
        elif stopped or code in (jobs.INTERRUPTED, jobs.TERMINATED, -signal.SIGINT, -signal.SIGTERM):
            state, record.error = "interrupted", "interrupted; goes on from its newest checkpoint"
        elif error is not None:
            record.error = error
        elif code < 0:
            often = " (often: out of memory)" if code == -signal.SIGKILL else ""
            state, record.error = "killed", f"ended by {signal.Signals(-code).name}{often}"
        else:
            record.error = f"exited with code {code} before it was finished"
        for path in (job.file, jobs.answer_path(job.file)):
            path.unlink(missing_ok=True)
        self._change(job, state)
        self.summary_is_old = True

    def _stop(self) -> None:
        """SIGINT to every job, so that it saves; SIGKILL to those still there after a grace, or at a second Ctrl-C."""
        running = self._all("running")
        for job in running:
            jobs.send(job.process, signal.SIGINT)
        until = time.monotonic() + self.options["grace_seconds"]
        try:
            while time.monotonic() < until and any(jobs.exit_code(job.process) is None for job in running):
                time.sleep(jobs.POLL_SECONDS)
        except (KeyboardInterrupt, SystemExit):
            log.info("ending the jobs at once")
        for job in running:
            jobs.send(job.process, signal.SIGKILL)
            while (code := jobs.exit_code(job.process)) is None:
                time.sleep(jobs.POLL_SECONDS)
            self._settle(job, code, stopped=True)
