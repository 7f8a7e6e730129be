"""What a person sees of a sweep while it runs: a live table on a terminal, else a line at each start and end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo_kit.sweep.launch.record import ACCURACY, DRIFT, JobRecord, Progress

REFRESH_SECONDS = 0.5
STYLES = {"waiting": "dim", "running": "bold cyan", "done": "green", "interrupted": "yellow"}  # of the others: red
log = logging.getLogger("dpo_kit.sweep")


class Board:
    """The jobs: on a terminal a table redrawn in place, elsewhere a line at each start and end and the table last."""

    def __init__(self, sweep_dir: Path, jobs: Sequence[JobRecord], console: Console | None = None) -> None:
        self.jobs, self.labels, self.place = jobs, label_jobs(jobs), near(sweep_dir)
        self.progress = {job.number: Progress(sweep_dir / job.dir) for job in jobs}
        self.started: dict[int, float] = {}
        self.live = Live(self.table(), console=console, auto_refresh=False) if console and console.is_terminal else None
        if self.live:
            self.live.start()
        elif before := sum(job.before for job in jobs):
            log.info("%d of %d jobs were done by an earlier start", before, len(jobs))
        self.drawn = time.monotonic()

    def changed(self, job: JobRecord) -> None:
        """`job` has started or ended. Figures of an earlier start stay until this one writes its own."""
        if job.state == "running":
            self.started[job.number] = time.time()
        if self.live:
            self._draw()
            return
        outcome = ""
        if job.error:
            outcome = f" after {format_seconds(job.seconds or 0)}: {job.error}"
        elif job.state != "running":
            progress = self.read(job)
            accuracy, drift = progress.figure(ACCURACY, ".3f"), progress.figure(DRIFT, ".2f")
            outcome = f" in {format_seconds(job.seconds or 0)}"
            outcome += f", held-out accuracy {accuracy}" if accuracy else ""
            outcome += f", forward KL (nats) {drift}" if drift else ""
        label = self.labels[[other.number for other in self.jobs].index(job.number)]
        log.info("job %d, %s: %s%s", job.number, label, "started" if job.state == "running" else job.state, outcome)

    def tick(self) -> None:
        """Some time has passed: called several times a second."""
        if self.live and time.monotonic() - self.drawn >= REFRESH_SECONDS:
            self._draw()

    def close(self) -> None:
        """The sweep has ended, well or not: leave the table as it stands."""
        if self.live:
            self._draw()
            self.live.stop()
        else:
            Console(width=100).print(self.table())

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        if self.live:
            self.live.update(self.table(), refresh=True)

    def read(self, job: JobRecord) -> Progress:
        """What `job` has measured so far."""
        progress = self.progress[job.number]
        progress.read(since=self.started.get(job.number, 0.0))
        return progress

    def table(self) -> Table:
        """One row per job."""
        done = sum(job.state == "done" for job in self.jobs)
        title = f"{done} of {len(self.jobs)} jobs done · {self.place}"
        table = Table(
            title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
        )
        table.add_column("job", justify="right", min_width=3)
        table.add_column("swept", overflow="ellipsis", no_wrap=True, max_width=34)
        table.add_column("state", no_wrap=True, min_width=11)  # fixed widths: nothing jumps while it runs
        for name, width in (("step", 11), ("held-out\naccuracy", 8), ("KL, nats\n(forward)", 9), ("time", 12)):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        for job, label in zip(self.jobs, self.labels, strict=True):
            progress = self.read(job)
            steps = progress.steps()
            shown_time = "before" if job.before else "" if job.seconds is None else format_seconds(job.seconds)
            if job.state == "running":
                left = progress.seconds_left()
                shown_time = "" if left is None else f"{format_seconds(left, coarse=True)} left"
            table.add_row(
                str(job.number),
                Text(label),
                Text(job.state, STYLES.get(job.state, "bold red")),
                f"{progress.step}/{steps}" if steps and progress.latest else "",
                progress.figure(ACCURACY, ".3f"),
                progress.figure(DRIFT, ".2f"),
                shown_time,
            )
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
