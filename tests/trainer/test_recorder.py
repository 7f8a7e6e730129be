"""metrics.jsonl is complete whatever happens, and wandb holds the same numbers."""

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_kit.errors import DataError
from dpo_kit.run import quiet, tracking
from dpo_kit.run.history import append_row, read_metrics
from dpo_kit.trainer import recorder
from dpo_kit.trainer.recorder import Progress, Recorder, show_progress
from tests.offline_wandb import log_files, read_offline

pytestmark = pytest.mark.timeout(120)


class Line(torch.nn.Module):
    """y = w x, as small as a model for a real Trainer can be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


class LogsAtTheStart(TrainerCallback):
    """Like the probe: logs in on_train_begin, perhaps before the recorder has seen that event."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        Trainer.log(self.trainer, {"probe/accuracy": 0.5})


def train(tmp_path: Path, *callbacks: TrainerCallback, steps: int = 6) -> Trainer:
    rows = [{"x": float(i), "labels": 2.0 * i} for i in range(24)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "checkpoints"), max_steps=steps, logging_steps=2, eval_strategy="steps", eval_steps=4,
        save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model=Line(), args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))
    for callback in callbacks:
        if isinstance(callback, LogsAtTheStart):
            callback.trainer = trainer
    show_progress(trainer)
    trainer.train()
    return trainer


def call_log(target: Recorder | Progress, logs: dict[str, Any], step: int = 1) -> None:
    state = TrainerState(global_step=step, epoch=0.5, is_world_process_zero=True)
    target.on_log(TrainingArguments("x", report_to="none"), state, TrainerControl(), logs=logs)


def test_an_offline_wandb_run_read_back_holds_every_metric_of_metrics_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = tracking.start({"beta": 0.1}, run_dir=tmp_path, project="lab", name="n")
    path = tmp_path / "metrics.jsonl"
    trainer = train(tmp_path, LogsAtTheStart(), Recorder(path, tracker))
    tracker.finish(0)

    rows = read_metrics(path)
    found = read_offline(log_files(tmp_path)[0])
    assert len(rows) == len(found.history) == len(trainer.state.log_history) == 7
    for row, sent, logged in zip(rows, found.history, trainer.state.log_history, strict=True):
        assert sent["train/global_step"] == row["step"] == logged["step"]
        assert row.keys() - {"time"} == logged.keys()
        for key in row.keys() - {"step", "time"}:
            assert sent[key] == pytest.approx(row[key]) == pytest.approx(logged[key])
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]
    assert rows[0]["probe/accuracy"] == 0.5
    assert found.exit_code == 0


def test_training_goes_on_and_the_record_is_complete_when_wandb_breaks_midway(tmp_path: Path) -> None:
    sent: list[int] = []

    def log_twice(row: dict[str, Any]) -> None:
        sent.append(row["train/global_step"])
        if len(sent) > 2:
            raise ConnectionAbortedError("wandb is gone")

    run = SimpleNamespace(log=log_twice, settings=SimpleNamespace(sync_dir="x"))
    path = tmp_path / "metrics.jsonl"
    trainer = train(tmp_path, Recorder(path, tracking.Tracker(run, mode="offline")))
    assert trainer.state.global_step == 6 and sent == [2, 4, 4]
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 4, 6, 6, 6]  # loss, eval, and a last row of timings


def test_what_is_not_finite_stays_strict_json_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    call_log(Recorder(path, tracking.Tracker()), {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-5})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["loss"] is None and strict["non_finite"] == {"loss": "nan", "grad_norm": "inf"}
    (row,) = read_metrics(path)
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf and row["lr"] == 1e-5


def test_numbers_of_numpy_and_torch_become_plain(tmp_path: Path) -> None:
    row = {"a": np.float32(0.5), "b": torch.tensor(2), "c": True, "d": None, "e": "x", "f": Path("p")}
    append_row(tmp_path / "metrics.jsonl", row)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"a": 0.5, "b": 2, "c": True, "d": None, "e": "x", "f": "p"}]


def test_only_a_torn_last_line_is_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2 is not JSON"):
        read_metrics(path)
    assert read_metrics(tmp_path / "none") == []


def test_other_processes_of_a_run_write_nothing(tmp_path: Path) -> None:
    state = TrainerState(global_step=1, is_world_process_zero=False)
    Recorder(tmp_path / "m.jsonl", tracking.Tracker()).on_log(
        TrainingArguments("x"), state, TrainerControl(), logs={"loss": 1.0}
    )
    assert not (tmp_path / "m.jsonl").exists()


def test_the_bar_is_silent_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, steps=2)
    out, err = capfd.readouterr()
    assert "loss" not in out + err and "it/s" not in out + err


def test_on_a_terminal_the_bar_carries_the_figures_and_no_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorder.sys.stderr, "isatty", lambda: True, raising=False)
    trainer = train(tmp_path, LogsAtTheStart(), steps=4)
    out, err = capfd.readouterr()
    assert "accuracy=0.5" in err and "loss=" in err and "4/4" in err
    assert "{" not in out + err
    assert not any(
        type(c).__name__ in ("ProgressCallback", "PrinterCallback") for c in trainer.callback_handler.callbacks
    )


def test_the_bar_shows_held_out_figures_by_name() -> None:
    progress = Progress()
    call_log(
        progress, {"loss": 0.5, "probe/margin_nats": 1.25, "probe/kl_forward_rb_nats": 0.1, "rewards/margins": 9.0}
    )
    assert progress.figures() == {"loss": "0.5", "margin": "1.25", "KL": "0.1"}
    call_log(progress, {"probe/kl_forward_k1_nats": -0.3})  # a check beside the other, which may be negative
    assert progress.figures()["KL"] == "0.1"
    call_log(progress, {"probe/kl_forward_rb_nats": 0.05, "probe/kl_floor_nats": 0.06})
    assert progress.figures() == {"loss": "0.5", "margin": "1.25", "KL": "rounding"}


def test_without_a_terminal_a_line_now_and_then_says_how_far_training_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [100.0]
    monkeypatch.setattr(recorder.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(recorder.sys.stderr, "isatty", lambda: False)
    progress, state = Progress(), SimpleNamespace(global_step=0, max_steps=200, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)  # type: ignore[arg-type]
    with caplog.at_level("INFO", "dpo_kit"):
        seen = (4, {"loss": 0.69}), (8, {"probe/accuracy": 0.625}), (4, {"loss": 0.6123}), (4, {"loss": 0.5})
        for step, (seconds, logs) in zip((5, 10, 15, 20), seen, strict=True):
            state.global_step = step
            clock[0] += seconds
            progress.on_log(None, state, None, logs=logs)  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [
        "step 15 of 200: loss 0.612, accuracy 0.625; 1.1 s a step with measuring, 3:17 left"
    ]


def test_a_phase_speaks_up_only_where_it_takes_its_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quiet, "SILENCE", 0.2)
    with caplog.at_level("INFO", "dpo_kit"):
        with quiet.phase("reading the rows"):
            pass
        with quiet.phase("loading the weights"):
            time.sleep(0.6)
    assert [record.getMessage() for record in caplog.records] == ["loading the weights …", "loading the weights: 1 s"]


def test_a_bar_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(quiet, "SILENCE", 0.0)
    monkeypatch.setattr(quiet, "BETWEEN", 0.0)
    with quiet.bar(6, "answers of base", "answer") as progress:
        for _ in range(3):
            progress.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"answers of base: {n} of 6" for n in (0, 2, 4, 6)]
    assert all(re.search(r" in [\d:]+, [\d:?]+ left$", line) for line in lines)
    monkeypatch.setattr(quiet, "BETWEEN", 60.0)
    with quiet.bar(6, "answers of base", "answer") as progress:
        progress.update(6)
    assert len(capsys.readouterr().err.splitlines()) <= 1  # short work needs no lines
