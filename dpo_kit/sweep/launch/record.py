"""sweep.json: every job of a sweep and how it stands, written anew and atomically at each change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from dpo_kit.run.files import write_json

State = Literal["waiting", "running", "done", "failed", "interrupted", "killed", "timed out"]
LOG = "job.log"


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
