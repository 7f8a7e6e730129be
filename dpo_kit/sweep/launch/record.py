"""How the jobs of a sweep stand: sweep.json, written anew and atomically at each change, and how far each run is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.history import decode_row
from dpo_kit.run.measures import in_rounding, kl_keys

State = Literal["waiting", "running", "done", "failed", "interrupted", "killed", "timed out"]
LOG = "job.log"
ACCURACY = ("probe/accuracy", "probe/auc")
DRIFT = kl_keys("forward")


@dataclasses.dataclass
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


def write_jobs(sweep_dir: Path, earlier: list[dict[str, Any]], jobs: list[JobRecord]) -> None:
    """sweep.json with the jobs of earlier batches (a sweeper that learns asks for several) and of this one."""
    write_json(sweep_dir / "sweep.json", {"jobs": [*earlier, *(dataclasses.asdict(job) for job in jobs)]})


class Progress:
    """The figures of one run from its metrics.jsonl while that is written; `read` costs nothing while it stays so."""

    def __init__(self, run_dir: Path) -> None:
        self.run = RunDirectory(run_dir)
        self.forget()

    def forget(self) -> None:
        """Begin anew: the run starts again, or goes on from a checkpoint."""
        self.seen: tuple[int, int] = (0, 0)  # inode, bytes read
        self.latest: dict[str, Any] = {}
        self.first: dict[str, Any] = {}  # of this start: the pace is measured from here

    def read(self, since: float = 0.0) -> None:
        """Take in the lines written after the last call; the pace counts from rows later than `since`."""
        try:
            status = self.run.metrics.stat()
        except OSError:
            return
        if status.st_ino != self.seen[0] or status.st_size < self.seen[1]:
            self.forget()
        if status.st_size <= self.seen[1]:
            return
        with self.run.metrics.open("rb") as file:
            file.seek(self.seen[1])
            whole, newline, _ = file.read().rpartition(b"\n")
        self.seen = (status.st_ino, self.seen[1] + len(whole) + len(newline))
        for line in whole.decode(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError, AttributeError):
                row = decode_row(line)
                self.latest |= row
                if not self.first and row.get("time", 0.0) >= since:
                    self.first = row

    def figure(self, keys: Sequence[str], form: str) -> str:
        """The latest value of the first of `keys` that the run measures, or "rounding" where it is no more; else ""."""
        key = next((key for key in keys if isinstance(self.latest.get(key), int | float)), None)
        if key is None:
            return ""
        return "rounding" if in_rounding(key, self.latest) else f"{self.latest[key]:{form}}"

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
