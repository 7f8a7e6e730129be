"""How the jobs of a sweep stand: sweep.json, a live table on a terminal, elsewhere lines now and then."""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.history import decode_row
from dpo_kit.run.measures import KLS
from dpo_kit.run.rounding import in_rounding

State = Literal["waiting", "running", "done", "failed", "interrupted", "killed", "timed out"]
STYLES = {"waiting": "dim", "running": "bold cyan", "done": "green", "interrupted": "yellow"}  # of the others: red
ACCURACY = ("probe/accuracy", "probe/auc")
REFRESH_SECONDS = 0.5
BETWEEN = 30.0  # seconds between two lines of a running job where there is no terminal
log = logging.getLogger("dpo_kit.sweep")


@dataclass
class JobRecord:
    """One job as sweep.json has it; `dir` and `log` are relative to the sweep directory, `seconds` of this start."""

    number: int
    dir: str
    overrides: list[str]
    method: str | None = None
    beta: float | None = None
    seed: int | None = None
    state: State = "waiting"
    before: bool = False  # done by an earlier start
    exit_code: int | None = None
    error: str | None = None
    log: str = ""
    seconds: float | None = None


class Progress:
    """The figures of one run from its metrics.jsonl while that is written; `read` costs nothing while it stays so."""

    def __init__(self, run_dir: Path) -> None:
        self.run = RunDirectory(run_dir)
        self.since = 0.0  # when this start began: the pace counts from rows later than this
        self.forget()

    def forget(self) -> None:
        """Begin anew: the run starts again, or goes on from a checkpoint."""
        self.seen: tuple[int, int] = (0, 0)  # inode, bytes read
        self.latest: dict[str, Any] = {}
        self.first: dict[str, Any] = {}  # of this start

    def read(self) -> Self:
        """Take in the lines written after the last call."""
        try:
            status = self.run.metrics.stat()
        except OSError:
            return self
        if status.st_ino != self.seen[0] or status.st_size < self.seen[1]:
            self.forget()
        if status.st_size > self.seen[1]:
            with self.run.metrics.open("rb") as file:
                file.seek(self.seen[1])
                whole, newline, _ = file.read().rpartition(b"\n")
            self.seen = (status.st_ino, self.seen[1] + len(whole) + len(newline))
            for line in whole.decode(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError, AttributeError):
                    row = decode_row(line)
                    self.latest |= row
                    if not self.first and row.get("time", 0.0) >= self.since:
                        self.first = row
        return self

    def figure(self, keys: Sequence[str], form: str) -> str:
        """The latest value of the first of `keys` that the run measures, or "rounding" where it is no more; else ""."""
        key = next((key for key in keys if isinstance(self.latest.get(key), int | float)), None)
        if key is None:
            return ""
        return "rounding" if in_rounding(key, self.latest) else f"{self.latest[key]:{form}}"

    def told(self) -> str:
        """The latest accuracy and drift in words, each after a comma; "" where neither is measured."""
        accuracy, drift = self.figure(ACCURACY, ".3f"), self.figure(KLS["forward"], ".2f")
        told = f", held-out accuracy {accuracy}" if accuracy else ""
        return told + (f", forward KL (nats) {drift}" if drift else "")

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.latest.get("step", 0))

    def steps(self) -> int | None:
        """Optimizer steps of the whole run; None until it is known."""
        if not self.run.trl_config.exists():
            return None
        trl, epoch = read_json(self.run.trl_config), self.latest.get("epoch")
        if trl.get("max_steps", -1) > 0:
            return int(trl["max_steps"])
        return round(self.step / epoch * trl["num_train_epochs"]) if epoch and self.step else None

    def seconds_left(self) -> float | None:
        """At the pace of this start so far; None until there is one."""
        steps, passed = self.steps(), self.step - int(self.first.get("step", 0))
        if not steps or passed <= 0:
            return None
        pace = (self.latest["time"] - self.first["time"]) / passed
        return max(0.0, pace * (steps - self.step) - (time.time() - self.latest["time"]))


class Board:
    """The jobs: on a terminal a table redrawn in place; elsewhere a line at each start and end, now and then one of
    each that runs, and the table last.
    """

    def __init__(self, sweep_dir: Path, jobs: Sequence[JobRecord], console: Console | None = None) -> None:
        self.jobs, self.place = jobs, near(sweep_dir)
        self.labels = {job.number: label for job, label in zip(jobs, label_jobs(jobs), strict=True)}
        self.progress = {job.number: Progress(sweep_dir / job.dir) for job in jobs}
        self.live = Live(self.table(), console=console, auto_refresh=False) if console and console.is_terminal else None
        self.drawn = time.monotonic()
        if self.live:
            self.live.start()
        elif before := sum(job.before for job in jobs):
            log.info("%d of %d jobs were done by an earlier start", before, len(jobs))

    def changed(self, job: JobRecord) -> None:
        """`job` has started or ended. Figures of an earlier start stay until this one writes its own."""
        progress, seconds, outcome = self.progress[job.number], format_seconds(job.seconds or 0), ""
        if job.state == "running":
            progress.since = time.time()
        if self.live:
            self.drawn = 0.0  # at once
            self.tick()
            return
        if job.error:
            outcome = f" after {seconds}: {job.error}"
        elif job.state != "running":
            outcome = f" in {seconds}{progress.read().told()}"
        state = "started" if job.state == "running" else job.state
        self._say(job, f"{state}{outcome}")

    def tick(self) -> None:
        """Some time has passed: called several times a second."""
        if time.monotonic() - self.drawn < (REFRESH_SECONDS if self.live else BETWEEN):
            return
        self.drawn = time.monotonic()
        if self.live:
            self.live.update(self.table(), refresh=True)
            return
        for job in self.jobs:
            if job.state == "running":
                progress = self.progress[job.number].read()
                left, steps = progress.seconds_left(), progress.steps()
                at = f"step {progress.step} of {steps}" if steps and progress.first else "before its first step"
                soon = "" if left is None else f", {format_seconds(left, coarse=True)} left"
                self._say(job, f"{at}{progress.told()}{soon}")

    def _say(self, job: JobRecord, what: str) -> None:
        log.info("job %d, %s: %s", job.number, self.labels[job.number], what)

    def close(self) -> None:
        """The sweep has ended, well or not: leave the table as it stands."""
        if self.live:
            self.live.update(self.table(), refresh=True)
            self.live.stop()
        else:
            Console(width=100).print(self.table())

    def table(self) -> Table:
        """One row per job."""
        title = f"{sum(job.state == 'done' for job in self.jobs)} of {len(self.jobs)} jobs done · {self.place}"
        table = Table(
            title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
        )
        table.add_column("job", justify="right", min_width=3)
        table.add_column("swept", overflow="ellipsis", no_wrap=True, max_width=34)
        table.add_column("state", no_wrap=True, min_width=11)  # fixed widths: nothing jumps while it runs
        for name, width in (("step", 11), ("held-out\naccuracy", 8), ("KL, nats\n(forward)", 9), ("time", 12)):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        for job in self.jobs:
            progress = self.progress[job.number].read()
            steps, state = progress.steps(), Text(job.state, STYLES.get(job.state, "bold red"))
            shown_time = "before" if job.before else "" if job.seconds is None else format_seconds(job.seconds)
            if job.state == "running":
                left = progress.seconds_left()
                shown_time = "" if left is None else f"{format_seconds(left, coarse=True)} left"
            at = f"{progress.step}/{steps}" if steps and progress.latest else ""
            figures = progress.figure(ACCURACY, ".3f"), progress.figure(KLS["forward"], ".2f")
            table.add_row(str(job.number), Text(self.labels[job.number]), state, at, *figures, shown_time)
        return table


def label_jobs(jobs: Sequence[JobRecord]) -> list[str]:
    """What tells each job from the others: its overrides that not all of them have, by the last part of their keys."""
    if len(jobs) == 1:
        return [f"beta={jobs[0].beta}"]
    common = set.intersection(*(set(job.overrides) for job in jobs))
    labels = []
    for job in jobs:
        words = (word.partition("=") for word in job.overrides if word not in common)
        labels.append(" ".join(f"{key.rpartition('.')[2]}{equals}{value}" for key, equals, value in words))
    return labels


def near(path: Path) -> Path:
    """`path` as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def format_seconds(seconds: float, *, coarse: bool = False) -> str:
    """12 s, 3 min 05 s, 2 h 10 min; `coarse` for what is only estimated: 3 min, 2 h 10."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min" if coarse else f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d}" + ("" if coarse else " min")
