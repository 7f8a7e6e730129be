"""Checkpoints on disk: what counts, what is set aside, what is kept; locks; when going on is refused."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dpo_kit.config.compose import check, compose
from dpo_kit.errors import ConfigError, TrainingError
from dpo_kit.run import lock
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.lock import only_writer
from dpo_kit.trainer.resume import go_on, whole_or_absent
from dpo_kit.trainer.resume import safe_trainer as safekeeping
from dpo_kit.trainer.resume import signals as interrupt
from dpo_kit.trainer.resume.go_on import find_fault, newest_verified, refuse_inexact_resume
from dpo_kit.trainer.resume.safe_trainer import Kept, Safekeeping
from dpo_kit.trainer.resume.signals import Interrupted
from dpo_kit.trainer.resume.which_rows import find_rows, likely_cause
from dpo_kit.trainer.resume.whole_or_absent import complete, list_checkpoints, refuse_full_disk, rotate
from tests import tiny
from tests.faults import fault

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "dpo_kit.pt",
    "record/metrics.jsonl",
    "manifest.json",
)
DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "with one bit flipped": lambda path: flip_bit(path),
}


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoints of steps 2 and 4 of a tiny DPO run, with a record."""
    folder = tmp_path_factory.mktemp("saved")
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 2, "loss": 0.5}\n' * 20)
    trainer = build(folder)
    trainer.kept = Kept(origin={"seed": 0}, record=lambda: {"metrics.jsonl": metrics})
    trainer.train()
    return folder / "out"


def build(folder, kind="dpo", dropout=0.0, **options):
    start = tiny.saved_model(folder / "start", dropout=dropout)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "save_total_limit": 2} | options
    return tiny.trainer(kind, start, folder / "out", mixins=[Safekeeping], **options)


# --- what counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"),
    [fault(f"{name} of the newest checkpoint {what}", "P1", name, what) for name in FILES for what in DAMAGES],
)
def test_a_damaged_checkpoint_is_set_aside_and_named_and_the_one_before_is_taken(
    name, damage, saved, tmp_path, caplog, record_property
):
    shutil.copytree(saved, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "checkpoint-4"
    assert find_fault(newest) is None
    DAMAGES[damage](newest / name)
    assert newest_verified(tmp_path / "checkpoints").name == "checkpoint-2"
    aside = tmp_path / "checkpoints" / "broken-checkpoint-4"
    assert aside.is_dir() and not newest.exists()
    assert str(newest) in caplog.text and aside.name in caplog.text and name.split("/")[-1] in caplog.text
    record_property("lost_work", "2 of 4 steps")


def test_plain_trl_takes_a_checkpoint_with_a_flipped_bit_for_good(saved, tmp_path):
    """The fault that we avoid is still there."""
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    trainer = tiny.trainer("dpo", tiny.saved_model(tmp_path / "start"), folder)
    flip_bit(folder / "checkpoint-4" / "model.safetensors")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    assert Path(get_last_checkpoint(folder)).name == "checkpoint-4"
    trainer.train(resume_from_checkpoint=True)


def test_plain_trl_killed_while_saving_leaves_a_newest_checkpoint_that_goes_on_with_other_weights(
    tmp_path, monkeypatch
):
    """The control: what is killed at the same moment loses its optimizer, and nobody says so."""

    class Killed(BaseException):
        pass

    def save_or_die(self, folder):
        if folder.endswith("checkpoint-4"):
            raise Killed
        honest(self, folder)

    start = tiny.saved_model(tmp_path / "start")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "eval_strategy": "no"}
    whole = tiny.trainer("dpo", start, tmp_path / "whole", **options)
    whole.train()
    honest = Trainer._save_optimizer_and_scheduler
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", save_or_die)
        tiny.trainer("dpo", start, tmp_path / "cut", **options).train()
    assert Path(get_last_checkpoint(tmp_path / "cut")).name == "checkpoint-4"
    (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").write_text(
        (tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text()
    )
    again = tiny.trainer("dpo", start, tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=True)
    assert not all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_where_every_checkpoint_is_broken_each_is_set_aside_and_the_run_starts_anew(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    for name in ("checkpoint-2", "checkpoint-4"):
        (folder / name / "optimizer.pt").unlink()
    assert newest_verified(folder) is None
    assert {path.name for path in folder.glob("broken-*")} == {"broken-checkpoint-2", "broken-checkpoint-4"}


@pytest.mark.fault("a checkpoint of plain TRL, without a manifest", promise="P2")
def test_a_checkpoint_of_plain_trl_is_refused_with_the_remedy(tmp_path):
    tiny.trainer(
        "dpo", tiny.saved_model(tmp_path / "start"), tmp_path / "out", save_strategy="steps", save_steps=4
    ).train()
    with pytest.raises(ConfigError, match=r"not written by dpo_kit.*resume=never"):
        newest_verified(tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_a_checkpoint_holds_everything_that_a_resume_needs_and_says_how_large_it_is(saved):
    names = json.loads((saved / "checkpoint-4" / "manifest.json").read_text())["content"]["files"]
    assert set(FILES) - {"manifest.json"} <= names.keys()
    assert go_on.read_facts(saved / "checkpoint-4") == {"step": 4, "origin": {"seed": 0}}


@pytest.mark.parametrize(
    "name",
    [fault(f"a crash that leaves {name}", "P1", name) for name in (".saving-checkpoint-6", ".removing-checkpoint-2")],
)
def test_what_was_half_written_or_half_removed_is_never_taken_for_a_checkpoint(name, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.copytree(saved / "checkpoint-2", folder / name)
    assert newest_verified(folder).name == "checkpoint-4" and not (folder / name).exists()


@pytest.mark.fault("a crash between taking a checkpoint away and putting its successor there", promise="P1")
def test_a_checkpoint_about_to_be_replaced_comes_back(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    (folder / "checkpoint-4").rename(folder / ".replaced-checkpoint-4")
    assert newest_verified(folder).name == "checkpoint-4"


def make(folder, step):
    aside = folder / f".saving-{step}"
    aside.mkdir(parents=True)
    (aside / "file").write_text(str(step))
    complete(aside, whole_or_absent.folder_of(folder, step), {"step": step})


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, {8, 10}),
        (1, None, {10}),
        (None, None, {2, 4, 6, 8, 10}),
        (2, 4, {4, 10}),
        (1, 4, {4, 10}),
        (3, 10, {6, 8, 10}),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(keep, best, left, tmp_path):
    for step in (2, 4, 6, 8, 10):
        make(tmp_path, step)
    rotate(tmp_path, keep, best and f"elsewhere/checkpoint-{best}")
    assert {int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)} == left


@pytest.mark.fault("rotation where the newer checkpoints have no manifest", promise="P1")
def test_rotation_never_removes_the_last_whole_checkpoint(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / "manifest.json").unlink()
    rotate(tmp_path, 1, None)
    assert newest_verified_step(tmp_path) == 2


def newest_verified_step(folder):
    return next(int(p.name.split("-")[1]) for p in list_checkpoints(folder) if find_fault(p) is None)


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "cpo"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_trainer_saves_whole_checkpoints_and_goes_on_bit_for_bit(kind, tuning, tmp_path):
    options = {"peft_config": tiny.LORA} if tuning == "lora" else {}
    whole = build(tmp_path / "whole", kind, logging_steps=3, **options)
    whole.train()
    first = build(tmp_path / "cut", kind, logging_steps=3, max_steps=4, **options)
    first.train()
    assert [find_fault(path) for path in list_checkpoints(tmp_path / "cut" / "out")] == [None, None]
    shutil.rmtree(tmp_path / "cut" / "out" / "checkpoint-4")
    again = build(tmp_path / "cut", kind, logging_steps=3, **options)
    again.train(resume_from_checkpoint=str(newest_verified(tmp_path / "cut" / "out")))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    wanted, found = (logged(trainer) for trainer in (whole, again))
    assert found == wanted


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_signal_saves_at_the_end_of_its_step_and_going_on_changes_no_bit(at, tmp_path):
    class Stopped(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step + 1 == at:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"max_steps": 6, "save_steps": 100, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 3}
    options |= {"dropout": 0.3, "disable_dropout": False}  # so that the random state counts
    whole = build(tmp_path / "whole", **options)
    whole.train()
    stopped = build(tmp_path / "cut", **options)
    handler = signal.getsignal(signal.SIGTERM)
    stopped.add_callback(Stopped())
    with pytest.raises(Interrupted):
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert stopped.stop.exception().code == 143
    newest = newest_verified(tmp_path / "cut" / "out")
    assert newest.name == f"checkpoint-{at}"
    again = build(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=str(newest))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert logged(again) == logged(whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_was_lost_in_a_callback_is_asked_for_again(monkeypatch):
    class Lost:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0)  # here the handler runs, and nobody hears what it raises

    monkeypatch.setattr(interrupt, "INSIST_SECONDS", 0.05)
    request = interrupt.StopRequest()
    until = time.monotonic() + 5
    with pytest.raises(Interrupted), interrupt.catch_signals(request):
        Lost()
        assert request.signal == signal.SIGTERM  # heard, and still going on
        while time.monotonic() < until:
            time.sleep(0.01)
    assert request.exception().code == 143


def test_a_run_that_was_moved_ends_with_its_best_checkpoint_or_says_that_it_is_gone(tmp_path):
    """Plain transformers forgets it with a warning and ends with another model (huggingface/transformers#48315)."""
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "constant"} | best
    whole = build(tmp_path / "whole", **options)
    whole.train()
    assert whole.state.best_model_checkpoint.endswith("checkpoint-2")
    build(tmp_path / "there", **options | {"max_steps": 4}).train()
    moved = (tmp_path / "there" / "out").rename(tmp_path / "moved")
    again = build(tmp_path / "there", **options)
    again.args.output_dir = str(moved)
    again.train(resume_from_checkpoint=str(newest_verified(moved)))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    shutil.rmtree(moved / "checkpoint-2")
    with pytest.raises(TrainingError, match=r"best checkpoint so far, .*checkpoint-2, is gone"):
        again.train(resume_from_checkpoint=str(newest_verified(moved)))


@pytest.mark.parametrize(
    ("options", "spare", "kept"),
    [
        ({}, True, [1, 6]),
        ({}, False, [1, 2, 3, 4, 5, 6]),
        (
            {
                "load_best_model_at_end": True,
                "metric_for_best_model": "loss",
                "eval_strategy": "steps",
                "eval_steps": 1,
            },
            True,
            [1, 2, 3, 4, 5, 6],
        ),
    ],
    ids=["left open", "typed", "each may be the best"],
)
def test_checkpoints_that_take_long_are_spared_where_their_cadence_was_left_open(
    options, spare, kept, tmp_path, monkeypatch
):
    trainer = build(tmp_path, save_steps=1, save_total_limit=None, max_steps=6, **options)
    trainer.kept = Kept(spare_saves=spare)
    real, steps = type(trainer)._save_own, []

    def slow(self, written, moment):
        steps.append(self.state.global_step)
        real(self, written, moment)
        clock[0] += 2  # seconds

    clock = [0.0]
    monkeypatch.setattr(type(trainer), "_save_own", slow)
    monkeypatch.setattr(safekeeping.time, "time", lambda: clock[0])
    trainer.train()
    assert steps == kept


def test_a_run_that_is_resumed_at_its_last_step_takes_no_further_one(tmp_path):
    options = {"max_steps": 3, "save_steps": 3}
    first, again = build(tmp_path, **options), build(tmp_path, **options)
    first.train()
    again.train(resume_from_checkpoint=str(newest_verified(tmp_path / "out")))
    assert again.state.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "accumulated", "rows"), [("dpo", 1, 4), ("kto", 1, 4), ("orpo", 1, 4), ("simpo", 1, 4), ("dpo", 2, 4)]
)
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_its_rows(
    kind, accumulated, rows, tmp_path, monkeypatch
):
    trainer = build(tmp_path, kind, gradient_accumulation_steps=accumulated)
    data = tiny.unary(16) if kind == "kto" else tiny.pairs(16)
    trainer.kept = Kept(pair_ids=[row["pair_id"] for row in data])
    honest, seen = Trainer.training_step, []

    def poisoned(self, model, inputs, *args):
        seen.append(find_rows(self, inputs))
        loss = honest(self, model, inputs, *args)
        return loss * float("nan") if self.state.global_step == 3 and len(seen) % accumulated == 0 else loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    before = []
    trainer.add_callback(KeepWeights(before))
    with pytest.raises(TrainingError, match=r"the loss is nan at step 4.*checkpoint-2.*") as failed:
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before[-1], trainer.model.parameters(), strict=True))
    named = str(failed.value).split("(pair_id): ")[1].split(". Likely")[0].split(", ")
    assert len(named) == rows and {f"p{row}" for row in seen[-1]} == set(named)


@pytest.mark.parametrize(
    ("norms", "diverges"), [([2.0, 19.9], False), ([2.0, 3.0, 20.1], True), ([30.0, 2.0], False), ([40.0], False)]
)
def test_training_is_said_to_diverge_once_the_gradient_is_ten_times_its_least(norms, diverges):
    state = SimpleNamespace(log_history=[{"grad_norm": norm} for norm in norms])
    trainer = SimpleNamespace(model=tiny.model(), args=SimpleNamespace(learning_rate=1e-3), state=state)
    assert ("training diverges" in likely_cause(trainer, [], [])) is diverges


class KeepWeights(TrainerCallback):
    def __init__(self, kept):
        self.kept = kept

    def on_step_end(self, args, state, control, model=None, **_):
        self.kept.append([p.detach().clone() for p in model.parameters()])


def logged(trainer):
    timed = ("_runtime", "_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]


def test_plain_transformers_takes_one_step_too_many_when_it_resumes_at_the_last(tmp_path):
    """The fault that we avoid is still there."""
    start = tiny.saved_model(tmp_path / "start")
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, "eval_strategy": "no"}
    tiny.trainer("dpo", start, tmp_path / "out", **options).train()
    again = tiny.trainer("dpo", start, tmp_path / "out", **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


# --- room on the disk --------------------------------------------------------------------------------------------


@pytest.mark.fault("too little room for the run, before its start", promise="P1")
def test_a_run_that_will_not_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_or_absent.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"3 checkpoints of .* free are 0\.00 GB.*save_total_limit=1"):
        build(tmp_path).train()


@pytest.mark.fault("too little room for the next checkpoint", promise="P1")
def test_room_is_looked_at_before_each_save_and_the_old_checkpoint_stays(tmp_path, monkeypatch, record_property):
    trainer = build(tmp_path)
    honest = whole_or_absent.refuse_full_disk

    def shrinking(folder, needed, what, error=TrainingError):
        if "step 4" in what:
            monkeypatch.setattr(whole_or_absent.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        honest(folder, needed, what, error)

    monkeypatch.setattr(whole_or_absent, "refuse_full_disk", shrinking)
    with pytest.raises(TrainingError, match="the checkpoint of step 4 needs about"):
        trainer.train()
    assert newest_verified(tmp_path / "out").name == "checkpoint-2"
    record_property("lost_work", "2 of 4 steps")


def test_enough_room_is_no_fault(tmp_path):
    refuse_full_disk(tmp_path, 1, "one byte")


# --- when going on is refused ------------------------------------------------------------------------------------

ORIGIN = {
    "config": {"beta": 0.1, "seed": 0},
    "data": {"train": "a" * 16},
    "model": {"sha256": "b" * 64},
    "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    "machine": {"device": "cpu", "world_size": 1},
}


@pytest.mark.parametrize(
    ("section", "key", "now"),
    [
        fault("another seed, then resume", "P2", "config", "seed", 1),
        fault("another beta, then resume", "P2", "config", "beta", 0.2),
        fault("other rows in the same file, then resume", "P2", "data", "train", "c" * 16),
        fault("other weights at the same path, then resume", "P2", "model", "sha256", "d" * 64),
        fault("another torch, then resume", "P2", "versions", "torch", "2.14.0"),
        fault("another TRL, then resume", "P2", "versions", "trl", "1.17.0"),
        fault("another device, then resume", "P2", "machine", "device", "NVIDIA H100"),
        fault("another number of processes, then resume", "P2", "machine", "world_size", 2),
    ],
)
def test_what_cannot_be_resumed_exactly_is_refused_with_the_difference(section, key, now):
    settings, here = check(compose(["tracking=none"])), json.loads(json.dumps(ORIGIN))
    refuse_inexact_resume(Path("checkpoint-2"), ORIGIN, here, settings)
    here[section][key] = now
    with pytest.raises(ConfigError) as refused:
        refuse_inexact_resume(Path("checkpoint-2"), ORIGIN, here, settings)
    assert f"{section}.{key}: {ORIGIN[section][key]} there, {now} now" in str(refused.value)
    assert "resume=never" in str(refused.value)


@pytest.mark.parametrize(
    "word",
    [
        fault("sync_ref_model, then resume", "P2", "trl.sync_ref_model=true"),
        fault("save_only_model, then resume", "P2", "trl.save_only_model=true"),
    ],
)
def test_a_checkpoint_that_lacks_what_moved_is_refused(word):
    with pytest.raises(ConfigError, match="cannot be resumed"):
        refuse_inexact_resume(Path("checkpoint-2"), ORIGIN, ORIGIN, check(compose([word])))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        fault("resume names a checkpoint that is not there", "P2", shutil.rmtree, "does not exist"),
        fault(
            "resume names a checkpoint that is broken", "P1", lambda path: (path / "optimizer.pt").unlink(), "is broken"
        ),
    ],
)
def test_a_named_checkpoint_is_verified_too(break_it, said, saved, tmp_path):
    named = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    break_it(named)
    settings = check(compose([f"resume={named}"]))
    with pytest.raises(ConfigError, match=said):
        go_on.find_checkpoint(settings, RunDirectory(tmp_path), {})


def test_a_start_from_an_earlier_checkpoint_puts_the_later_ones_by_and_takes_its_record_back(saved, tmp_path):
    run = RunDirectory(tmp_path)
    shutil.copytree(saved, run.checkpoints)
    run.metrics.write_text('{"step": 9}\n')
    run.samples.write_text('{"step": 9}\n')
    go_on.begin_from(run, run.checkpoints / "checkpoint-2")
    assert {path.name for path in run.checkpoints.glob("*checkpoint-*")} == {"checkpoint-2", "earlier-checkpoint-4"}
    assert run.metrics.read_text() == '{"step": 2, "loss": 0.5}\n' * 20 and not run.samples.exists()
    go_on.begin_from(run, None)
    assert not run.metrics.exists() and list_checkpoints(run.checkpoints) == []


# --- one writer --------------------------------------------------------------------------------------------------

HOLD = "import sys, time; from pathlib import Path; from dpo_kit.run.lock import only_writer\n"
HOLD += "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_directory_has_one_writer_and_a_dead_one_s_lock_is_recovered(holder, tmp_path, caplog):
    with pytest.raises(ConfigError, match=f"is being written by process {holder.pid} on "), only_writer(tmp_path):
        pass
    holder.kill()
    holder.wait()
    caplog.set_level("INFO")
    with only_writer(tmp_path):
        assert f"process {holder.pid} ended without giving" in caplog.text
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), only_writer(tmp_path):
            pass
    assert (tmp_path / ".lock").read_text() == ""


@pytest.mark.fault("a file system without locks", promise="P6")
def test_where_the_file_system_has_no_locks_a_marker_file_takes_their_place(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with only_writer(tmp_path), pytest.raises(ConfigError, match="is being written by process"), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


def left_by(tmp_path, pid=None, host=None, since=None):
    """A lock as it stands after its holder died; by default as if this process held it."""
    (tmp_path / ".lock").write_text(f"{pid or os.getpid()}\n{host or socket.gethostname()}\n")
    if since is not None:
        os.utime(tmp_path / ".lock", (since, since))


@pytest.mark.fault("a lock left on another host", promise="P6")
def test_a_lock_left_on_another_host_is_refused_with_what_to_do(tmp_path):
    left_by(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(ConfigError, match=r"process 7 on elsewhere.*delete .*\.lock"), only_writer(tmp_path):
        pass


@pytest.mark.parametrize(
    "changed",
    [
        fault("a lock left before a reboot", "P6", {"pid": 1, "since": 1e9}),
        fault("a lock whose process number was given to another process", "P6", {"since": 1e9}),
        fault("a lock of a process that is gone", "P6", {"pid": 2**22 + 1}),
    ],
)
def test_a_stale_lock_is_recovered(changed, tmp_path):
    left_by(tmp_path, **changed)
    with only_writer(tmp_path):
        assert lock.read_holder(tmp_path).pid == os.getpid()


@pytest.mark.fault("a lock that the file system does not enforce, its holder alive", promise="P6")
def test_a_living_holder_is_respected_where_locks_do_nothing(tmp_path):
    left_by(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()}"), only_writer(tmp_path):
        pass


def test_a_job_waits_for_a_writer_that_is_about_to_end(holder, tmp_path):
    import threading

    from dpo_kit.sweep.launch.job import wait_for_writer

    threading.Timer(0.5, holder.kill).start()
    wait_for_writer(tmp_path, 20)
    assert not lock.is_alive(lock.read_holder(tmp_path))
