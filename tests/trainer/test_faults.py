"""What is promised of a run that is killed, stopped, poisoned, starved or started twice, tried on the command line.

Each test ends by comparing with the same run undisturbed: weights bit for bit, the record line by line.
"""

import csv
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import read_metrics
from dpo_kit.trainer.resume.go_on import newest_verified
from dpo_kit.trainer.resume.whole_or_absent import folder_of
from tests.conftest import ROOT
from tests.faults import fault, run_cli, start_cli
from tests.faults_table import EXISTING
from tests.small import differences, few_pairs, hash_model

STEPS = 6
SAVING = [f"trl.max_steps={STEPS}", "trl.eval_steps=3", "trl.save_steps=1", "trl.logging_steps=1", "hydra.run.dir=run"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A run of 6 steps that is logged and saved at each and evaluated at two."""
    return [*few_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl"), *SAVING]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The same run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_cli(words, folder, env={"DPO_KIT_CACHE": str(folder / "cache")})
    assert done.code == 0, done.text
    return folder / "run"


@pytest.fixture(scope="module")
def seldom(words):
    """The same run saved only at its end, so that a signal has to save, and logged at its fourth step."""
    changed = ("trl.save_steps", "trl.logging_steps")
    return [*(word for word in words if not word.startswith(changed)), "trl.save_steps=100", "trl.logging_steps=4"]


@pytest.fixture(scope="module")
def whole_seldom(seldom, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seldom")
    done = run_cli(seldom, folder)
    assert done.code == 0, done.text
    return folder / "run"


@pytest.fixture
def lost(record_property):
    """Record the steps that have to be taken again after a fault: those logged beyond the newest checkpoint."""

    def measure(run, reached=None):
        newest = newest_step(run)
        reached = last_step(run) if reached is None else reached
        record_property("lost_work", f"{max(0, reached - newest)} of {STEPS} steps")
        return newest

    return measure


def newest_step(run):
    found = newest_verified(run / "checkpoints", writer=False)
    return int(found.name.split("-")[1]) if found else 0


def last_step(run):
    return max((row["step"] for row in read_metrics(run / "metrics.jsonl")), default=0)


def status(run):
    return (RunDirectory(run).read_result() or {}).get("status")


def test_every_test_that_the_table_names_is_there():
    sources = "".join(file.read_text() for file in ROOT.glob("tests/**/test_*.py"))
    assert [name for name in EXISTING if f"def {name}(" not in sources] == []


# --- killed at a named point -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "newest"),
    [
        fault("SIGKILL while the model is loaded", "P1", "start:load:kill", 0),
        fault("SIGKILL before the reference pass is stored", "P8", "ref_cache:write:kill", 0),
        fault("SIGKILL after the reference pass is stored", "P8", "ref_cache:written:kill", 0),
        fault("SIGKILL while step 0 is measured", "P1", "measure:start:kill", 0),
        fault("SIGKILL between gradient and optimizer step", "P1", "step#4:kill", (2, 3)),
        fault("SIGKILL at the beginning of an evaluation", "P1", "eval:kill", (1, 2)),
        fault("SIGKILL in the middle of an evaluation", "P1", "eval:drift#2:kill", 2),
        fault("SIGKILL between metrics.jsonl and probe.jsonl", "P2", "record:probe#2:kill", 2),
        fault("SIGKILL before a save", "P1", "save:before#3:kill", (1, 2)),
        fault("SIGKILL after the model of a checkpoint", "P1", "save:after=model#3:kill", 2),
        fault("SIGKILL after the optimizer of a checkpoint", "P1", "save:after=optimizer#3:kill", 2),
        fault("SIGKILL after the random state of a checkpoint", "P1", "save:after=rng#3:kill", 2),
        fault("SIGKILL after the trainer's state of a checkpoint", "P1", "save:after=state#3:kill", 2),
        fault("SIGKILL after the record of a checkpoint", "P1", "save:after=record#3:kill", 2),
        fault("SIGKILL while a checkpoint is hashed", "P1", "save:hash#25:kill", (1, 2)),
        fault("SIGKILL before the manifest of a checkpoint", "P1", "save:manifest#3:kill", 2),
        fault("SIGKILL between manifest and rename", "P1", "save:rename#4:kill", (0, 1, 2)),
        fault("SIGKILL between rename and rotation", "P1", "save:rotate#3:kill", 3),
        fault("SIGKILL while an old checkpoint is removed", "P1", "save:removing#9:kill", (2, 3, 4)),
        fault("SIGKILL before the final model is written", "P1", "finish:model:kill", STEPS),
        fault("SIGKILL after the final model is written", "P1", "finish:saved:kill", STEPS),
        fault("SIGKILL while the report is drawn", "P1", "finish:report:kill", STEPS),
        fault("SIGKILL before the result is written", "P1", "finish:result:kill", STEPS),
    ],
)
def test_a_run_killed_at_a_named_point_goes_on_and_equals_the_undisturbed_one(
    point, newest, words, whole, tmp_path, lost
):
    env = {"DPO_KIT_CACHE": str(tmp_path / "cache")}
    killed = run_cli(words, tmp_path, fault=point, env=env)
    assert killed.code == -signal.SIGKILL, killed.text
    run = tmp_path / "run"
    assert status(run) is None
    assert lost(run) in ((newest,) if isinstance(newest, int) else newest)
    again = run_cli(words, tmp_path, env=env)
    assert again.code == 0, again.text
    assert differences(whole, run) == []
    assert not list((run / "checkpoints").glob(".*"))


def kill_at_random(words, folder, seed, kills, usual):
    """Kill a run at up to `kills` random moments of its `usual` seconds, until one start is faster than that.

    Returns the steps that each kill made it repeat.
    """
    rng = random.Random(seed)
    repeated, seen = [], 0
    while len(repeated) < kills:
        running = start_cli(words, folder)
        running.process.join(rng.uniform(0.1, usual))
        if not running.process.is_alive():
            assert running.wait().code == 0, running.text
            return repeated
        running.send(signal.SIGKILL)
        running.wait()
        seen = max(seen, last_step(folder / "run"))
        repeated.append(seen - newest_step(folder / "run"))
    assert run_cli(words, folder).code == 0
    return repeated


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.fault("50 SIGKILLs at random moments, each followed by a resume", promise="P1")
def test_fifty_kills_at_random_moments_lose_no_checkpoint_and_change_no_bit(words, whole, tmp_path, record_property):
    fast = [*words, "callbacks=none"]
    undisturbed = run_cli([*fast, "hydra.run.dir=undisturbed"], tmp_path)
    assert undisturbed.code == 0, undisturbed.text
    wanted, repeated, runs = hash_model(tmp_path / "undisturbed"), [], 0
    while len(repeated) < 50:
        folder = tmp_path / f"killed-{runs}"
        repeated += kill_at_random(fast, folder, seed=runs, kills=50 - len(repeated), usual=undisturbed.seconds)
        assert hash_model(folder / "run") == wanted, f"run {runs}"
        assert not list((folder / "run" / "checkpoints").glob("broken-*"))
        runs += 1
    record_property("lost_work", f"{sum(repeated)} steps after {len(repeated)} kills of {runs} runs")
    other = run_cli([*fast, "seed=1", "hydra.run.dir=other"], tmp_path)
    assert other.code == 0 and hash_model(tmp_path / "other") != wanted


@pytest.mark.slow
def test_another_seed_gives_other_weights_and_another_record(words, whole, tmp_path):
    """The control of the comparisons above: they can fail."""
    assert run_cli([*words, "seed=1"], tmp_path).code == 0
    found = differences(whole, tmp_path / "run")
    assert found[0] == "weights" and any(line.startswith("metrics.jsonl") for line in found)


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "code", "step"),
    [
        fault("SIGTERM while the model is loaded", "P1", "start:load:term", 143, 0),
        fault("SIGTERM while step 0 is measured", "P1", "measure:start:term", 143, 0),
        fault("SIGTERM in a step", "P1", "step#4:term", 143, 4),
        fault("Ctrl-C in a step", "P1", "step#4:int", 130, 4),
        fault("SIGTERM in a step that ends with an evaluation", "P1", "step#3:term", 143, 3),
        fault("SIGTERM at the beginning of an evaluation", "P1", "eval:term", 143, 3),
        fault("SIGTERM in the middle of an evaluation", "P1", "eval:probe#2:term", 143, 3),
        fault("Ctrl-C in the middle of an evaluation", "P1", "eval:drift#2:int", 130, 3),
        fault("SIGTERM while saving", "P1", "save:after=model:term", 143, STEPS),
        fault("SIGTERM while the end is measured", "P1", "eval:drift#3:term", 143, STEPS),
        fault("SIGTERM while the report is drawn", "P1", "finish:report:term", 143, STEPS),
    ],
)
def test_a_signal_saves_says_how_to_go_on_and_costs_no_step(point, code, step, seldom, whole_seldom, tmp_path, lost):
    stopped = run_cli(seldom, tmp_path, fault=point)
    run = tmp_path / "run"
    assert stopped.code == code, stopped.text
    assert "Traceback" not in stopped.text
    assert newest_step(run) == step == lost(run, reached=step)
    if RunDirectory(run).manifest.exists():
        assert status(run) == "interrupted"
    if 0 < step < STEPS:
        assert f"saving at step {step}" in stopped.text
        assert f"stopped after step {step}; to go on: python -m dpo_kit" in stopped.text
    again = run_cli(seldom, tmp_path)
    assert again.code == 0, again.text
    assert differences(whole_seldom, run) == []


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C twice: the second one while saving", promise="P1")
def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_stays(words, whole, tmp_path, lost):
    stopped = run_cli(words, tmp_path, fault="save:after=optimizer#4:twice")
    assert stopped.code == 130 and "stopping at once" in stopped.text, stopped.text
    run = tmp_path / "run"
    assert lost(run, reached=4) == 3 and status(run) == "interrupted"
    assert not list((run / "checkpoints").glob(".saving*"))
    assert run_cli(words, tmp_path).code == 0
    assert differences(whole, run) == []


@pytest.mark.slow
@pytest.mark.fault("SIGTERM to a job of a sweep, from Ctrl-C of the sweep", promise="P5")
def test_an_interrupted_sweep_lets_its_jobs_save(words, tmp_path, command, record_property):
    grid = [word for word in words if not word.startswith(("hydra.run.dir", "trl.max_steps", "trl.save_steps"))]
    grid += ["trl.max_steps=400", "trl.save_steps=1000", "trl.eval_steps=1000", "callbacks=none", "trl.logging_steps=1"]
    running = subprocess.Popen(
        [sys.executable, "-m", "dpo_kit", "-m", "beta=0.1,0.2", *grid, "hydra.sweep.dir=sweep"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run, until = tmp_path / "sweep" / "dpo-beta0.1-seed0", time.monotonic() + 100
    while last_step(run) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    text, _ = running.communicate(timeout=100)
    assert running.returncode == 143, text
    assert newest_step(run) >= 3 and newest_step(run) >= last_step(run) and status(run) == "interrupted", text
    record_property("lost_work", f"{last_step(run) - newest_step(run)} steps")


# --- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "said"),
    [
        fault("a loss that is NaN", "P3", "step:loss#4:nan", "the loss is nan at step 4"),
        fault("a loss that is infinite", "P3", "step:loss#4:inf", "the loss is inf at step 4"),
        fault("a NaN that goes through the backward pass", "P3", "step:backward#3:nan", "the loss is nan at step 3"),
        fault("a gradient with one NaN", "P3", "step:gradient#4:grad", "the norm of the gradient is nan at step 4"),
    ],
)
def test_what_is_not_finite_stops_before_the_weights_change_and_names_rows_checkpoint_and_cause(
    point, said, words, tmp_path, lost
):
    failed = run_cli([*words, "callbacks=none"], tmp_path, fault=point)
    run, step = tmp_path / "run", int(said[-1])
    assert failed.code == 1 and said in failed.text and "Traceback" not in failed.text, failed.text
    assert f"Last good checkpoint: {folder_of(run / 'checkpoints', step - 1)}" in failed.text
    assert "Likely cause" in failed.text
    named = failed.text.split("(pair_id): ")[1].split(". Likely")[0].split(", ")
    assert len(named) == 4 and set(named) <= trained_pair_ids(words)
    assert status(run) == "failed" and not (run / "model").exists()
    assert lost(run, reached=step - 1) == step - 1
    assert all_finite(folder_of(run / "checkpoints", step - 1))


def trained_pair_ids(words):
    from dpo_kit.config.compose import check, compose
    from dpo_kit.data.prepare import prepare
    from dpo_kit.model.load import load_tokenizer

    settings = check(compose([word for word in words if not word.startswith("hydra")]))
    data = prepare(
        settings.data,
        wanted="pairs",
        tokenizer=load_tokenizer(settings.model),
        max_length=settings.trl["max_length"],
        truncation="keep_start",
        seed=0,
    )
    return {row["pair_id"] for row in data.train}


def all_finite(folder):
    from safetensors.torch import load_file

    return all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.slow
def test_plain_trl_ends_well_on_a_loss_that_is_not_finite_and_saves_what_is_broken(tmp_path, monkeypatch):
    """The fault that we avoid is still there."""
    import torch
    from transformers import Trainer

    from tests import tiny

    trainer = tiny.trainer("dpo", tiny.saved_model(tmp_path / "start"), tmp_path / "out")
    honest = Trainer._clip_grad_norm

    def poisoned(self, model):
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return honest(self, model)

    monkeypatch.setattr(Trainer, "_clip_grad_norm", poisoned)
    trainer.train()
    assert not all(torch.isfinite(p).all() for p in trainer.model.parameters())


# --- the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "left"),
    [
        fault("disk full while the optimizer is saved", "P1", "save:optimizer#3:enospc", 2),
        fault("disk full while the manifest is written", "P1", "save:manifest#3:enospc", 2),
        fault("disk full while the record grows", "P1", "record:metrics#6:enospc", (1, 2)),
    ],
)
def test_a_full_disk_keeps_the_old_checkpoint_and_says_what_to_do(point, left, words, whole, tmp_path, lost):
    failed = run_cli(words, tmp_path, fault=point)
    run = tmp_path / "run"
    assert failed.code == 1 and "Traceback" not in failed.text, failed.text
    assert "No space left on device" in failed.text and "GB are free" in failed.text
    assert status(run) == "failed" and not list((run / "checkpoints").glob(".saving*"))
    assert lost(run) in ((left,) if isinstance(left, int) else left)
    assert run_cli(words, tmp_path).code == 0
    assert differences(whole, run) == []


@pytest.mark.slow
@pytest.mark.fault("a limit on the size of files (RLIMIT_FSIZE)", promise="P1")
def test_a_file_that_may_not_grow_fails_clearly_and_leaves_nothing_half_written(words, tmp_path, lost):
    failed = run_cli(words, tmp_path, limit=200_000)
    run = tmp_path / "run"
    assert failed.code == 1 and "could not be written" in failed.text, failed.text
    assert "Traceback" not in failed.text and status(run) == "failed"
    assert lost(run) == 0 and not list((run / "checkpoints").glob(".saving*"))


# --- two at a time -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("a second start while the first still runs", promise="P6")
def test_a_second_start_is_refused_naming_the_first_which_goes_on(words, whole, tmp_path):
    first = start_cli(words, tmp_path)
    first.wait_for("steps of")
    second = run_cli(words, tmp_path)
    assert second.code == 2 and f"is being written by process {first.pid} on" in second.text, second.text
    assert first.wait().code == 0 and differences(whole, tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.fault("the holder of a lock is killed", promise="P6")
def test_the_lock_of_a_dead_process_is_recovered(words, tmp_path):
    first = start_cli(words, tmp_path)
    first.wait_for("steps of")
    first.send(signal.SIGKILL)
    first.wait()
    again = run_cli([*words, "callbacks=none"][:-1], tmp_path)
    assert again.code == 0 and f"process {first.pid} ended without giving" in again.text, again.text


# --- a sweep -----------------------------------------------------------------------------------------------------

BETAS = "beta=0.05,0.1,0.2,0.5"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault("a sweep of four betas, ten times killed at random and started again", promise="P5")
def test_a_sweep_killed_ten_times_ends_with_the_same_summary(words, tmp_path, record_property):
    grid = ["-m", BETAS, *(word for word in words if not word.startswith("hydra.run.dir"))]
    undisturbed = sweep(grid, tmp_path, "undisturbed")
    assert undisturbed.wait(timeout=300) == 0, output(tmp_path, "undisturbed")
    rng, kills = random.Random(7), 0
    while kills < 10:
        running = sweep(grid, tmp_path, "killed")
        try:
            running.wait(timeout=rng.uniform(3, 12))
        except subprocess.TimeoutExpired:
            running.kill()  # its jobs notice, save and end
            running.wait()
            kills += 1
            continue
        shutil.rmtree(tmp_path / "killed")  # all done before ten kills: once more
    assert sweep(grid, tmp_path, "killed").wait(timeout=300) == 0, output(tmp_path, "killed")
    wanted, found = (summary(tmp_path / name) for name in ("undisturbed", "killed"))
    assert found == wanted
    assert [row["status"] for row in found] == ["done"] * 4 and len({row["margin_nats"] for row in found}) == 4
    record_property("lost_work", f"{kills} kills")


def sweep(grid, folder, name):
    log = (folder / f"{name}.txt").open("ab")
    command = [sys.executable, "-m", "dpo_kit", *grid, f"hydra.sweep.dir={name}"]
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def output(folder, name):
    return (folder / f"{name}.txt").read_text()


def summary(folder):
    with (folder / "summary.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


# --- several processes -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("SIGTERM to two processes that train together", promise="P2")
def test_two_processes_stop_at_the_same_step_and_go_on_bit_for_bit(words, tmp_path, record_property):
    changed = ("trl.max_steps", "trl.save_steps", "trl.eval_steps", "trl.logging_steps", "hydra.run.dir")
    few = [word for word in words if not word.startswith(changed)]
    few += ["trl.max_steps=40", "trl.save_steps=100", "trl.eval_steps=20", "trl.logging_steps=3", "callbacks=none"]
    few += ["trl.per_device_train_batch_size=2", "trl.ddp_backend=gloo"]
    assert torchrun(few, tmp_path, "whole").wait(timeout=200) == 0, output(tmp_path, "whole")
    stopped, until = torchrun(few, tmp_path, "cut"), time.monotonic() + 100
    while last_step(tmp_path / "cut") < 6 and time.monotonic() < until:
        time.sleep(0.05)
    stopped.terminate()
    stopped.wait(timeout=100)
    assert 6 <= newest_step(tmp_path / "cut") < 40, output(tmp_path, "cut")
    assert torchrun(few, tmp_path, "cut").wait(timeout=200) == 0, output(tmp_path, "cut")
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    record_property("lost_work", "0 of 40 steps")


def torchrun(words, folder, name):
    log = (folder / f"{name}.txt").open("ab")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dpo_kit"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, *words, f"hydra.run.dir={name}"], cwd=folder, stdout=log, stderr=log
    )
