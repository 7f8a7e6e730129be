"""The run directory: what its files are called and how they are written. Standard library only.

A run directory is the only thing that passes between training, sweeps, evaluation and export; `result.json` is
written last, so that it means "this run has ended, and this is how".
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.run.files import read_json, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run's files. `root` need not exist yet."""

    root: Path

    manifest = property(lambda self: self.root / "manifest.json")
    trl_config = property(lambda self: self.root / "trl_config.json")
    data_report = property(lambda self: self.root / "data_report.json")
    dropped_rows = property(lambda self: self.root / "dropped_rows.jsonl")
    metrics = property(lambda self: self.root / "metrics.jsonl")
    probe = property(lambda self: self.root / "probe.jsonl")
    probe_state = property(lambda self: self.root / "probe_state")
    samples = property(lambda self: self.root / "samples.jsonl")
    preview = property(lambda self: self.root / "preview.json")
    checkpoints = property(lambda self: self.root / "checkpoints")
    model = property(lambda self: self.root / "model")
    picture = property(lambda self: self.root / "report.png")
    page = property(lambda self: self.root / "report.md")
    result = property(lambda self: self.root / "result.json")
    test = property(lambda self: self.root / "test.json")
    judge = property(lambda self: self.root / "judge")
    evaluation = property(lambda self: self.root / "evaluation")
    export = property(lambda self: self.root / "export")
    reproduction = property(lambda self: self.root / "reproduce")
    wandb_file = property(lambda self: self.root / "wandb_id")

    def read_result(self) -> dict[str, Any] | None:
        """How the run ended, or None where it has not."""
        return read_json(self.result) if self.result.exists() else None

    def wandb_id(self, wanted: str | None = None) -> str:
        """The id of this run's wandb run, the same whenever the run goes on; `wanted` where it has none yet."""
        if not self.wandb_file.exists():
            write_text(self.wandb_file, wanted or secrets.token_hex(4))
        return self.wandb_file.read_text()

    def record(self) -> dict[str, Path]:
        """The files that grow with the run, by name: a resumed run takes them back from its checkpoint."""
        kept = [*self.probe_state.glob("*.pt"), self.metrics, self.probe, self.samples, self.wandb_file]
        return {path.relative_to(self.root).as_posix(): path for path in kept}
