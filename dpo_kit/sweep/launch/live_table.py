"""What a person sees of a sweep while it runs: a live table on a terminal, else a line at each start and end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo_kit.sweep.launch.progress import ACCURACY, DRIFT, Progress
from dpo_kit.sweep.launch.record import JobRecord

REFRESH_SECONDS = 0.5
STYLES = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "failed": "bold red",
    "killed": "bold red",
    "timed out": "bold red",
    "interrupted": "yellow",
}
log = logging.getLogger("dpo_kit.sweep")


class View(Protocol):
    """Told of each change of a job and, several times a second, of the time."""

    def changed(self, job: JobRecord) -> None:
        """`job` has started or ended."""

    def tick(self) -> None:
        """Some time has passed."""

    def close(self) -> None:
        """The sweep has ended, well or not: leave the table as it stands."""


class Board:
    """The jobs with their figures, as a table."""

    def __init__(self, sweep_dir: Path, jobs: Sequence[JobRecord]) -> None:
        self.jobs, self.labels = jobs, label_jobs(jobs)
        self.progress = {job.number: Progress(sweep_dir / job.dir) for job in jobs}
        self.started: dict[int, float] = {}
        self.place = near(sweep_dir)

    def note_start(self, job: JobRecord) -> None:
        """Figures of an earlier start stay until this one writes its own."""
        self.started[job.number] = time.time()

    def read(self, job: JobRecord) -> Progress:
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
            table.add_row(*self._cells(job, label))
        return table

    def _cells(self, job: JobRecord, label: str) -> list[Text | str]:
        progress = self.read(job)
        accuracy, drift, steps = progress.figure(ACCURACY), progress.figure(DRIFT), progress.steps()
        done = f"{progress.step}/{steps}" if steps else ""
        return [
            str(job.number),
            Text(label),
            Text(job.state, STYLES[job.state]),
            done if progress.latest else "",
            "" if accuracy is None else f"{accuracy:.3f}",
            "" if drift is None else f"{drift:.2f}",
            self._time(job, progress),
        ]

    def _time(self, job: JobRecord, progress: Progress) -> str:
        if job.state == "running":
            left = progress.seconds_left()
            return "" if left is None else f"{format_seconds(left, coarse=True)} left"
        return "before" if job.before else "" if job.seconds is None else format_seconds(job.seconds)


class LiveTable:
    """The board, redrawn in place."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board = board
        self.live = Live(board.table(), console=console, auto_refresh=False)
        self.live.start()
        self.drawn = time.monotonic()

    def changed(self, job: JobRecord) -> None:
        if job.state == "running":
            self.board.note_start(job)
        self._draw()

    def tick(self) -> None:
        if time.monotonic() - self.drawn >= REFRESH_SECONDS:
            self._draw()

    def close(self) -> None:
        self._draw()
        self.live.stop()

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        self.live.update(self.board.table(), refresh=True)


class Lines:
    """A line at the start and the end of each job, the table at the end."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board, self.console = board, console
        if before := sum(job.before for job in board.jobs):
            log.info("%d of %d jobs were done by an earlier start", before, len(board.jobs))

    def changed(self, job: JobRecord) -> None:
        label = self.board.labels[[each.number for each in self.board.jobs].index(job.number)]
        if job.state == "running":
            self.board.note_start(job)
            log.info("job %d, %s: started", job.number, label)
            return
        log.info("job %d, %s: %s%s", job.number, label, job.state, self._outcome(job))

    def _outcome(self, job: JobRecord) -> str:
        if job.error:
            return f" after {format_seconds(job.seconds or 0)}: {job.error}"
        accuracy, drift = (self.board.read(job).figure(keys) for keys in (ACCURACY, DRIFT))
        figures = [f"held-out accuracy {accuracy:.3f}"] if accuracy is not None else []
        figures += [f"forward KL {drift:.2f} nats"] if drift is not None else []
        return ", ".join([f" in {format_seconds(job.seconds or 0)}", *figures])

    def tick(self) -> None:
        """Nothing: a line is for good."""

    def close(self) -> None:
        self.console.print(self.board.table())


def open_view(sweep_dir: Path, jobs: Sequence[JobRecord]) -> View:
    """A live table where there is a terminal, lines elsewhere."""
    console, board = Console(), Board(sweep_dir, jobs)
    return LiveTable(board, console) if console.is_terminal else Lines(board, Console(width=100))


def label_jobs(jobs: Sequence[JobRecord]) -> list[str]:
    """What tells each job from the others: its overrides that not all of them have."""
    if len(jobs) == 1:
        return [f"beta={jobs[0].beta}"]
    common = set.intersection(*(set(job.overrides) for job in jobs))
    return [" ".join(_brief(word) for word in job.overrides if word not in common) for job in jobs]


def _brief(override: str) -> str:
    key, equals, value = override.partition("=")
    return key.rpartition(".")[2] + equals + value


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
