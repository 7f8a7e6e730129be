"""What is decided from data, hardware and environment, and what is known to hold a run back before its first step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_kit.config.compose import check, compose
from dpo_kit.config.identity import list_differences, origin
from dpo_kit.errors import ConfigError, TrainingError
from dpo_kit.model.load import load_tokenizer, rounded_share
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.report.findings import held_back
from dpo_kit.trainer.arguments import build_arguments, decide
from dpo_kit.trainer.manifest import build_manifest
from dpo_kit.trainer.refusals import refusing
from dpo_kit.training import run_trainer

ROWS = [{"label": True}, {"label": False}] * 32


def settings(*words):
    return check(compose(["tracking=none", *words]))


@pytest.mark.parametrize("asked", ["no", "bf16"])
def test_the_precision_of_accelerate_s_environment_is_obeyed_everywhere_or_nowhere(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    args = build_arguments(settings(), ROWS, tmp_path, 64)
    assert (args.bf16, args.mixed_precision) == (asked == "bf16", asked)
    typed = build_arguments(settings("trl.bf16=false"), ROWS, tmp_path, 64)
    assert (typed.bf16, typed.mixed_precision) == (False, "no")


def test_a_run_goes_on_under_the_precision_of_the_environment_that_it_began_in(monkeypatch):
    def started_from(*words):
        given, nothing = settings(*words), SimpleNamespace(train=[], select=[], test=[])
        return origin(build_manifest(given, nothing, None, load_tokenizer(given.model)))

    before, typed_before = started_from(), started_from("trl.bf16=false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert list_differences(before, started_from()) == ["machine.mixed_precision: None there, bf16 now"]
    assert started_from("trl.bf16=false") == typed_before  # where it decides nothing


def test_a_precision_that_nobody_here_knows_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="must be one of no, bf16, fp16, got fp8"):
        decide(settings().trl, ROWS, 64)


@pytest.mark.parametrize(
    ("saved", "steps", "every"), [(5, 20, 1), (6, 40, 3), (7, 40, 1), (50, 1000, 50), (0.2, 40, 0.2)]
)
def test_an_open_cadence_divides_the_steps_between_checkpoints(saved, steps, every, tmp_path):
    best = ["trl.load_best_model_at_end=true", "trl.metric_for_best_model=probe/accuracy"]
    chosen = settings(*best, f"trl.save_steps={saved}", f"trl.max_steps={steps}")
    assert build_arguments(chosen, ROWS, tmp_path, 64).eval_steps == every


@pytest.mark.parametrize("words", [["method=kto"], ["trl.dataloader_drop_last=true", "trl.max_steps=2"]])
def test_fewer_rows_than_the_only_batch_are_refused(words, tmp_path):
    with pytest.raises(ConfigError, match=r"64 rows are fewer than a batch of 65.*train_batch_size=64 or less"):
        build_arguments(settings(*words, "trl.per_device_train_batch_size=65"), ROWS, tmp_path, 64)
    build_arguments(settings(*words, "trl.per_device_train_batch_size=64"), ROWS, tmp_path, 64)


def test_a_step_below_the_rounding_of_the_weights_is_counted():
    model = torch.nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data = torch.tensor([[1.0, 0.5, 0.001, 0.0]], dtype=torch.bfloat16)
    # spacing of bfloat16: 2**-7 of the power of two below; so half of it is 2**-8 at 1, 2**-9 at .5, 2**-18 at .001
    for rate, share in ((2**-7, 0), (2**-8.5, 0.25), (2**-10, 0.5), (2**-19, 0.75)):
        assert rounded_share(model, rate) == share
        moved = (model.weight.data + torch.tensor(rate, dtype=torch.bfloat16)) != model.weight.data
        assert 1 - moved.float().mean() == share  # as bfloat16 itself adds
    assert rounded_share(model.float(), 1e-9) == 0


def arguments(warmup, scheduler="linear"):
    return SimpleNamespace(learning_rate=2e-4, lr_scheduler_type=scheduler, get_warmup_steps=lambda steps: warmup)


def test_what_keeps_a_run_from_moving_is_known_before_it_starts():
    assert not [*held_back(arguments(4), 40, 0.5)]
    assert not [*held_back(arguments(1000, "constant"), 10, 0)]
    (warm,) = held_back(arguments(1000), 11, 0)
    assert warm.symptom == "Warm-up takes 1000 of 11 steps: the learning rate never gets above 1% of 0.0002."
    assert warm.change == {"trl.warmup_steps": "0.1"} and "change" not in warm.saved()
    (rounded,) = held_back(arguments(0), 40, 0.985)
    assert "98.5% of the trained weights" in rounded.symptom and rounded.change == {"model.dtype": "auto"}


def test_a_library_s_own_refusal_names_what_was_typed(monkeypatch):
    monkeypatch.setattr("dpo_kit.trainer.refusals.typed_words", lambda: ["seed=1", "trl.optim_args=eps"])
    said = r"TRL's arguments refuse trl\.optim_args=eps: ValueError: optim_args is odd"
    with pytest.raises(ConfigError, match=said), refusing("TRL's arguments"):
        raise ValueError("optim_args is odd")


class Standing:
    """A trainer that ends as its `train` says."""

    seconds_before, state = 0.0, SimpleNamespace(global_step=0)

    def __init__(self, error=None):
        self.error = error

    def train(self, resume_from_checkpoint):
        if self.error:
            raise self.error


def test_a_run_that_took_no_step_has_failed():
    with pytest.raises(TrainingError, match="took no step"):
        run_trainer(Standing(), None, None, None)


def test_what_a_library_raises_while_training_is_one_line_with_the_step():
    with pytest.raises(TrainingError, match=r"stopped before its first step; typed: this config: KeyError: 'x'"):
        run_trainer(Standing(KeyError("x")), RunDirectory(Path("run")), None, None)
