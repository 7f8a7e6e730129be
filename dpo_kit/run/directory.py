"""The run directory: what its files are called. result.json is written last: "this run has ended, and this is how"."""

import secrets
from pathlib import Path
from typing import Any

from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.run.files import read_json, write_text

FACTS = "export.json"  # in the folder of an export: what it was made of, and how


class RunDirectory:
    """Paths of one run's files. `root` need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "manifest.json"
        self.trl_config = root / "trl_config.json"
        self.data_report = root / "data_report.json"
        self.dropped_rows = root / "dropped_rows.jsonl"
        self.metrics = root / "metrics.jsonl"
        self.probe = root / "probe.jsonl"
        self.probe_state = root / "probe_state"
        self.samples = root / "samples.jsonl"
        self.preview = root / "preview.json"
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.path = root / "path"
        self.picture = root / "report.png"
        self.page = root / "report.md"
        self.result = root / "result.json"
        self.test = root / "test.json"
        self.judge = root / "judge"
        self.evaluation = root / "evaluation"
        self.export = root / "export"
        self.reproduction = root / "reproduce"
        self.wandb_file = root / "wandb_id"

    def weights(self, step: int | None) -> Path:
        """The model as it was after `step` steps, where it was kept on the way; None: the last one."""
        return self.model if step is None else self.path / f"step-{step}"

    def at(self, step: int) -> "RunDirectory":
        """The same with what was kept after `step` steps as its model. ConfigError where nothing was."""
        earlier = RunDirectory(self.root)
        earlier.model = self.weights(step)
        if not earlier.model.is_dir():
            there = ", ".join(map(str, self.kept_steps())) or "none: a run with callbacks.path=4 keeps four"
            raise ConfigError(f"step={step}: {self.root} has no weights of that step; kept on its way: {there}")
        return earlier

    def evaluation_of(self, step: int | None) -> Path:
        """Where `evaluate` keeps what it finds of the policy after `step` steps (None: of the last one)."""
        return self.evaluation if step is None else self.evaluation / f"step-{step}"

    def kept_steps(self) -> list[int]:
        """The steps whose weights were kept on the way."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.path.glob("step-*"))

    def test_of(self, step: int | None) -> Path:
        """What the policy after `step` steps (None: the last one) measured on the test split."""
        return self.test if step is None else self.weights(step) / self.test.name

    def read_result(self) -> dict[str, Any] | None:
        """How the run ended, or None where it has not."""
        return read_json(self.result) if self.result.exists() else None

    def read_finished(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest and result of a run that has ended well; ConfigError for any other folder."""
        if not self.manifest.exists():
            if RunDirectory(self.root.parent).manifest.exists():
                meant = f"did you mean run={self.root.parent}?"
            elif any(self.root.glob("*/manifest.json")):
                meant = f"it is a sweep, say sweep={self.root} (evaluate, sweep), or name one of its runs"
            elif self.root.is_dir():
                meant = f"for a model made elsewhere say policy={self.root} reference=… (evaluate)"
            else:
                siblings = [path.parent.name for path in self.root.parent.glob("*/manifest.json")]
                meant = did_you_mean(self.root.name, siblings, "name the folder that holds manifest.json")
            raise ConfigError(f"run={self.root} is no run directory (it has no manifest.json): {meant.lstrip('; ')}")
        result = self.read_result() or {"status": "running or killed"}
        if result["status"] != "done":
            raise ConfigError(f"run={self.root} has not ended well (status: {result['status']}): finish it first")
        return read_json(self.manifest), result

    def wandb_id(self, wanted: str | None = None) -> str:
        """The id of this run's wandb run, the same whenever the run goes on; `wanted` where it has none yet."""
        if not self.wandb_file.exists():
            write_text(self.wandb_file, wanted or secrets.token_hex(4))
        return self.wandb_file.read_text()

    def record(self) -> dict[str, Path]:
        """The files that grow with the run, by name: a resumed run takes them back from its checkpoint."""
        kept = [*self.probe_state.glob("*.pt"), self.metrics, self.probe, self.samples, self.wandb_file]
        return {path.relative_to(self.root).as_posix(): path for path in kept}
