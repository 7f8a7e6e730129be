"""Sweeps through submitit and Ray on this machine: the same jobs, the same summary as with the default launcher."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import dpo_kit
from dpo_kit.cli import main as cli
from dpo_kit.config.compose import compose, compose_unchecked
from dpo_kit.config.settings import Tracking
from dpo_kit.errors import ConfigError, SweepError
from dpo_kit.sweep.launch.plan import Plan, plan_sweep
from dpo_kit.toy import TRAIN
from tests import fake_slurm
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/ray' is validated")  # as the command line does
MARK = "DPO_KIT_TEST_MARK"
QUIET = {"WANDB_MODE": "offline", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
WORDS = [
    "-m",
    "beta=0.05,0.5",
    "trl.max_steps=4",
    "trl.eval_steps=2",
    "trl.per_device_train_batch_size=4",
    "callbacks.pairs=16",
    "callbacks.prompts=8",
    "data.train=pairs.jsonl",
    "data.eval=null",
    "data.holdout=0.4",
    "hydra.sweep.dir=swept",
]


def needs(package, extra):
    return pytest.importorskip(package, reason=f"needs the extra {extra}")


def run_sweep(folder, *words, **env):
    """The command in `folder`, its paths relative to it; every process that it starts inherits a mark."""
    (folder / "pairs.jsonl").write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:40]))
    done = subprocess.run(
        [sys.executable, "-m", "dpo_kit", *WORDS, *words],
        cwd=folder,
        env=os.environ | QUIET | {MARK: str(folder)} | env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done


def summary(folder):
    with (folder / "swept" / "summary.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def groups(folder):
    """The wandb group of each run of the sweep, and of the sweep's own run."""
    from tests.offline_wandb import log_files, read_offline

    files = [file for run in (folder / "swept").iterdir() for file in log_files(run)]
    return [read_offline(file).run.run_group for file in [*files, *log_files(folder / "swept")]]


def processes_of(folder):
    """Processes that the sweep in `folder` has started and that are still there."""
    mark, found = f"{MARK}={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]))
        except OSError:  # gone, or a zombie
            continue
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The summary that the default launcher comes to."""
    folder = tmp_path_factory.mktemp("processes")
    run_sweep(folder)
    rows = summary(folder)
    assert [(row["beta"], row["status"]) for row in rows] == [("0.05", "done"), ("0.5", "done")]
    assert rows[0]["margin_nats"] != rows[1]["margin_nats"] and float(rows[0]["kl_reverse_nats"]) > 0
    return rows


def check(folder, expected):
    assert summary(folder) == expected
    assert groups(folder) == ["swept"] * 3
    best = json.loads((folder / "swept" / "best.json").read_text())
    assert best["recommended"] is None and (folder / "swept" / "frontier.png").stat().st_size > 0
    refuse_left_processes(folder)


def refuse_left_processes(folder):
    until = time.monotonic() + 60
    while (left := processes_of(folder)) and time.monotonic() < until:
        time.sleep(0.5)
    assert left == []


@pytest.mark.slow
def test_a_sweep_through_submitit_ends_with_the_summary_of_the_default_launcher(expected, tmp_path):
    needs("hydra_plugins.hydra_submitit_launcher", "slurm")
    run_sweep(tmp_path, "hydra/launcher=submitit_local")
    check(tmp_path, expected)


@pytest.mark.slow
def test_a_sweep_through_our_slurm_option_asks_sbatch_for_an_array_and_ends_the_same(expected, tmp_path):
    """Against small stand-ins for sbatch, srun and sacct."""
    needs("hydra_plugins.hydra_submitit_launcher", "slurm")
    fake_slurm.install(tmp_path / "bin")
    run_sweep(tmp_path, "hydra/launcher=slurm", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    asked = (tmp_path / "bin" / "submitted").read_text()
    flags = ("array=0-1%2", "gpus-per-node=1", "cpus-per-task=8", "mem=64GB", "time=720", "job-name=dpo_kit")
    assert [flag for flag in flags if f"#SBATCH --{flag}\n" not in asked] == []
    check(tmp_path, expected)


@pytest.mark.slow
def test_a_sweep_through_a_local_ray_ends_with_the_summary_of_the_default_launcher_and_leaves_no_process(
    expected, tmp_path
):
    needs("hydra_plugins.hydra_ray_launcher", "ray")
    run_sweep(tmp_path, "hydra/launcher=ray", "hydra.launcher.ray.remote.num_cpus=1")
    check(tmp_path, expected)


@pytest.mark.slow
def test_a_job_whose_process_is_killed_is_started_again_by_ray(tmp_path):
    needs("hydra_plugins.hydra_ray_launcher", "ray")
    (tmp_path / "marks").mkdir()
    fake = {"FAKE": "0.1=kill", "FAKE_ONCE": str(tmp_path / "marks"), "PYTHONPATH": str(ROOT)}
    words = ["-m", "beta=0.1,0.2", "hydra/launcher=ray", "tracking=none", "hydra.sweep.dir=swept"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_sweep", *words],
        cwd=tmp_path,
        env=os.environ | QUIET | fake | {MARK: str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    starts = [
        len((tmp_path / "swept" / f"dpo-beta{beta}-seed0" / "starts").read_text().splitlines()) for beta in (0.1, 0.2)
    ]
    assert starts == [2, 1]
    refuse_left_processes(tmp_path)


# --- what a cluster needs to be told ------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_jobs_on_a_cluster_are_told_where_to_write_and_which_wandb_group_is_theirs(
    option, package, tmp_path, monkeypatch
):
    needs(f"hydra_plugins.hydra_{package}_launcher", option)
    monkeypatch.chdir(tmp_path)
    words = ["beta=0.1,0.2", f"hydra/launcher={option}", "hydra.sweep.dir=mine"]
    plan = plan_sweep(words, [], "config")
    assert plan.named == [f"hydra.sweep.dir='{tmp_path}/mine'", "++hydra.job.env_set.WANDB_RUN_GROUP='mine'"]
    assert plan.directory == Path("mine") and not plan.local
    told = compose_unchecked(["beta=0.1", *words[1:], *plan.named], with_hydra=True).hydra
    assert (told.sweep.dir, told.job.env_set.WANDB_RUN_GROUP) == (f"{tmp_path}/mine", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    assert "WANDB_RUN_GROUP='ours'" in plan_sweep(words, [], "config").named[1]


def test_our_ray_option_wins_over_the_plugin_s_of_the_same_name():
    needs("hydra_plugins.hydra_ray_launcher", "ray")
    ray = compose_unchecked(["hydra/launcher=ray"], with_hydra=True).hydra.launcher.ray
    assert (ray.init.object_store_memory, ray.init.log_to_driver, ray.remote.max_calls) == (None, False, 1)


def test_our_slurm_option_is_the_plugin_s_with_other_defaults():
    needs("hydra_plugins.hydra_submitit_launcher", "slurm")
    launcher = compose_unchecked(
        ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"], with_hydra=True
    ).hydra.launcher
    assert launcher._target_.endswith("submitit_launcher.SlurmLauncher") and launcher.partition == "gpu"
    assert (launcher.timeout_min, launcher.max_num_timeout, launcher.array_parallelism) == (720, 3, 4)


@pytest.mark.parametrize("own_folder", [False, True])
def test_a_job_goes_to_the_folder_of_the_command_unless_it_runs_in_one_of_its_own(own_folder, tmp_path, monkeypatch):
    home, elsewhere, seen = tmp_path / "home", tmp_path / "elsewhere", []
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    runtime = SimpleNamespace(output_dir="run", cwd=str(home))
    told = SimpleNamespace(runtime=runtime, job=SimpleNamespace(chdir=own_folder))
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: told)
    monkeypatch.setattr(cli, "show", lambda result: seen.append(Path.cwd()))
    monkeypatch.setattr(dpo_kit, "train", lambda cfg, run_dir: SimpleNamespace(final={}), raising=False)
    cli.task(compose())
    assert seen == [elsewhere if own_folder else home]


def test_a_process_that_was_left_behind_would_be_seen(tmp_path):
    left = subprocess.Popen(["sleep", "20"], env=os.environ | {MARK: str(tmp_path)})
    try:  # the kernel shows a new program's environment a moment after it has started
        until = time.monotonic() + 10
        while not (seen := processes_of(tmp_path)) and time.monotonic() < until:
            time.sleep(0.01)
        assert [pid for pid, _ in seen] == [left.pid]
    finally:
        left.kill()
        left.wait()
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "local", "summed_up"),
    [
        (ValueError("the error of a job"), False, True),
        (ConfigError("a job's directory holds another run"), False, True),
        (SweepError("1 of 2 jobs did not end well"), True, True),
        (ConfigError("is being run by another process"), True, False),
    ],
)
def test_a_sweep_with_a_failed_job_is_summed_up_under_every_launcher(error, local, summed_up, monkeypatch):
    def fail():
        raise error

    concluded = []
    monkeypatch.setattr(cli, "run", fail)
    monkeypatch.setattr(cli, "_conclude", concluded.append)
    plan = Plan([], Path("swept"), Tracking(**compose().tracking), local)
    with pytest.raises(type(error)):
        cli._sweep(plan)
    assert concluded == ([plan] if summed_up else [])
