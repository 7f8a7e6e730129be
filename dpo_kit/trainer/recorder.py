"""Where a trainer's numbers go: metrics.jsonl (always), the tracker (when it can), a progress bar (on a terminal)."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dpo_kit.config.settings import Settings
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import append_row, plain
from dpo_kit.run.processes import is_writer
from dpo_kit.trainer.manifest import sweep_folder

if TYPE_CHECKING:
    from dpo_kit.run.tracking import Tracker

log = logging.getLogger(__name__)
BETWEEN = 10.0  # seconds between two lines where there is no terminal


def start_tracking(settings: Settings, config: dict[str, Any], run: RunDirectory) -> Tracker | None:
    """A wandb run of `config`; None where another reporter or none is chosen, and in processes beside the first."""
    if settings.tracking.reporter != "wandb" or not is_writer():
        return None
    from dpo_kit.run import tracking

    options, wanted = settings.tracking.model_dump(exclude={"reporter"}), os.environ.get("WANDB_RUN_ID")
    if sweep_folder():  # variables that all jobs share
        wanted = None
        if options["name"] == os.environ.get("WANDB_NAME"):
            options["name"] += f"-{run.root.name}"
    return tracking.start(config, run_dir=run.root, run_id=run.wandb_id(wanted), **options)


class Recorder(TrainerCallback):
    """Write each log event to `path` as {"step", "epoch", "time", **metrics} and its numbers to `tracker`, if any.

    Keys stay as the trainer names them; time is in seconds since 1970.
    """

    def __init__(self, path: Path, tracker: Tracker | None) -> None:
        self.path, self.tracker = path, tracker

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            append_row(self.path, {"step": state.global_step, "epoch": state.epoch, "time": time.time()} | logs)
            if self.tracker is not None:
                self.tracker.log(logs, state.global_step)


class Progress(ProgressCallback):
    """A bar with the figures that matter behind it; where the output is no terminal a line with them now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, float] = {}
        self.began = (0, 0.0)  # step and time
        self.last_line = 0.0

    def figures(self) -> dict[str, str]:
        """{short name: latest value, or "rounding" where it is no more}: the loss of training, all else on held-out
        rows and in nats.
        """
        values = self.latest
        shown = {"loss": f"{values['loss']:.3g}"} if "loss" in values else {}
        if any(key.startswith("probe/") for key in values):
            from dpo_kit.run.measures import MEASURES
            from dpo_kit.run.rounding import in_rounding

            for key, name in ((m.key, m.bar) for m in MEASURES if m.bar and m.key in values):
                # the first of a name: k1 stands beside rb as a check
                shown.setdefault(name, "rounding" if in_rounding(key, values) else f"{values[key]:.3g}")
        return shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.last_line = (state.global_step, time.monotonic()), time.monotonic()
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """No second bar for an evaluation: it lasts seconds."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        values = {key: plain(value) for key, value in (logs or {}).items()}
        self.latest |= {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.figures())
        elif "loss" in (logs or {}) and state.is_world_process_zero and time.monotonic() - self.last_line > BETWEEN:
            self.last_line = time.monotonic()
            first, began = self.began
            per_step = (self.last_line - began) / max(1, state.global_step - first)
            minutes, seconds = divmod(round(per_step * (state.max_steps - state.global_step)), 60)
            log.info(
                f"step {state.global_step} of {state.max_steps}: "
                f"{', '.join(f'{name} {value}' for name, value in self.figures().items())}; "
                f"{per_step:.2g} s a step with measuring, {minutes}:{seconds:02d} left"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def show_progress(trainer: Trainer) -> None:
    """Put `Progress` in the place of transformers' own bar and printer, which write a dict per log event."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(Progress())
