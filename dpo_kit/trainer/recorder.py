"""Where a trainer's numbers go: metrics.jsonl (always), the tracker (when it can), a progress bar (on a terminal)."""

import logging
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dpo_kit.run.history import append_row, keep_rows_until, plain, read_metrics
from dpo_kit.run.measures import MEASURES
from dpo_kit.run.tracking import Tracker

log = logging.getLogger(__name__)
BETWEEN = 10.0  # seconds between two lines where there is no terminal

__all__ = ["Progress", "Recorder", "read_metrics", "show_progress"]


class Recorder(TrainerCallback):
    """Write each log event to `path` as {"step", "epoch", "time", **metrics} and its numbers to `tracker`.

    Keys stay as the trainer names them; time is in seconds since 1970. A run that resumes at step k drops the rows
    after k first, since it writes them again; a run that starts at 0 begins the file anew.
    """

    def __init__(self, path: str | Path, tracker: Tracker | None = None) -> None:
        self.path = Path(path)
        self.tracker = tracker or Tracker()
        self._ready = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._prepare(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self._prepare(state)
        row = {"step": state.global_step, "epoch": state.epoch, "time": time.time()}
        append_row(self.path, row | logs)
        self.tracker.log(logs, state.global_step)

    def _prepare(self, state: TrainerState) -> None:
        """Other callbacks may log before our on_train_begin, so whichever comes first makes the file ready."""
        if self._ready or not state.is_world_process_zero:
            return
        self._ready = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            keep_rows_until(self.path, state.global_step if state.global_step > 0 else -1)


class Progress(ProgressCallback):
    """A bar with the figures that matter behind it; where the output is no terminal a line with them now and then."""

    # the loss of training, all else on held-out rows and in nats
    SHOWN: ClassVar = {"loss": "loss"} | {measure.key: measure.short for measure in MEASURES if measure.short}

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, str] = {}
        self.began = (0, 0.0)  # step and time
        self.said = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began, self.said = (state.global_step, time.monotonic()), time.monotonic()
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """No second bar for an evaluation: it lasts seconds."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, name in self.SHOWN.items():
            value = plain((logs or {}).get(key))
            if isinstance(value, int | float):
                self.figures[name] = f"{value:.3g}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.figures)
        elif "loss" in (logs or {}) and state.is_world_process_zero and time.monotonic() - self.said > BETWEEN:
            self._say(state)

    def _say(self, state: TrainerState) -> None:
        self.said = time.monotonic()
        step, began = self.began
        per_step = (self.said - began) / max(1, state.global_step - step)
        left = per_step * (state.max_steps - state.global_step)
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        minutes, seconds = divmod(round(left), 60)
        where = (state.global_step, state.max_steps, figures, per_step, minutes, seconds)
        log.info("step %d of %d: %s; %.2g s a step with measuring, %d:%02d left", *where)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def show_progress(trainer: Trainer) -> None:
    """Put `Progress` in the place of transformers' own bar and printer, which write a dict per log event."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(Progress())
