"""Sweeps: what is refused before anything is written, and what becomes of jobs that fail, exit, die or hang."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from rich.console import Console

from dpo_kit import training
from dpo_kit.cli.main import means_multirun
from dpo_kit.config.compose import compose, compose_unchecked
from dpo_kit.errors import ConfigError, SweepError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import write_json
from dpo_kit.sweep.launch.job import device_slots, visible_devices
from dpo_kit.sweep.launch.launcher import Job, threads_per_job
from dpo_kit.sweep.launch.plan import plan_sweep, split_jobs
from dpo_kit.sweep.launch.progress import Board, JobRecord, Progress, format_seconds, label_jobs
from tests.conftest import ROOT
from tests.small import few_pairs

GRIDS = {"standard": [0.05, 0.1, 0.2, 0.5], "wide": [0.01, 0.05, 0.1, 0.2, 0.5, 1.0], "simpo": [2, 2.5, 5, 10]}


# --- before anything runs -----------------------------------------------------------------------------------------


def plan(*overrides):
    return plan_sweep(overrides, [], "config").named


def directory(*overrides):
    return next(word.split("=", 1)[1].strip("'") for word in plan(*overrides) if word.startswith("hydra.sweep.dir="))


@pytest.mark.parametrize("option", GRIDS)
def test_an_option_of_beta_sweep_is_the_grid_that_it_says(option):
    method = "simpo" if option == "simpo" else "dpo"
    base = compose_unchecked([f"method={method}", f"beta-sweep={option}"], with_hydra=True)
    assert [float(beta) for beta in base.hydra.sweeper.params.beta.split(",")] == GRIDS[option]
    assert base.speed.reference_store is True


@pytest.mark.parametrize(
    ("words", "sweeps"),
    {
        "beta-sweep=standard": True,
        "+beta-sweep=standard seed=1": True,
        "beta-sweep=none": False,
        "beta=0.1": False,
        "beta-sweep=standard --help": False,
        "beta-sweep=standard --cfg job": False,
        "beta-sweep=standard --info": False,
        "beta-sweep=standard hydra.mode=RUN": False,
        "beta-sweep=standard -r": False,
    }.items(),
)
def test_naming_a_beta_sweep_asks_for_a_sweep_and_questions_do_not(words, sweeps):
    assert means_multirun(get_args_parser().parse_args(words.split())) is sweeps


def test_the_words_of_the_command_line_win_over_the_option_and_add_axes():
    grid = ["beta=0.05,0.1,0.2,0.5"]
    assert len(split_jobs([*grid, "seed=0,1,2"])) == 12
    assert split_jobs([*grid, "beta=0.3"]) == [["beta=0.3"]]


def test_the_same_jobs_have_the_same_directory_in_any_order_and_other_jobs_have_another():
    here = directory("beta=0.1,0.5")
    assert re.fullmatch(r"outputs/sweep-[0-9a-f]{8}", here)
    assert directory("beta=0.5,0.1") == here
    assert directory("beta=0.1,0.5", "tracking=none", "resume=never") == here
    others = [["beta=0.1,0.2"], ["beta=0.1,0.5", "seed=1"], ["beta=0.1,0.5", "trl.max_steps=9"], ["beta=0.1"]]
    assert len({here, *(directory(*words) for words in others)}) == 5


def test_methods_and_a_beta_sweep_make_every_combination():
    jobs = split_jobs(["beta=0.05,0.1,0.2,0.5", "method=dpo,ipo,kto", "beta-sweep=standard"])
    assert len(jobs) == 12 and ["beta=0.1", "method=kto", "beta-sweep=standard"] in jobs
    assert directory("method=dpo,ipo", "beta-sweep=standard") != directory("beta-sweep=standard")


def test_a_directory_of_one_s_own_wins():
    assert plan("beta=0.1,0.5", "hydra.sweep.dir=mine") == []


def test_jobs_that_would_share_a_directory_have_their_further_axes_in_its_name():
    named = plan("beta=0.1,0.5", "trl.learning_rate=1e-6,2e-6", "model=tiny,qwen2.5-0.5b")[1]
    assert "-learning_rate${dpo_kit.file_name:${trl.learning_rate}}" in named
    assert "-model${dpo_kit.file_name:${hydra.runtime.choices.model}}" in named
    assert len(plan("beta=0.1,0.5", "seed=0,1")) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=simpo beta-sweep=standard", "its grid is 2, 2.5, 5, 10"),
        ("method=dpo,simpo beta=0.1,0.2", "method=simpo"),
        ("beta=0.1,0.1", "two jobs of this sweep are the same run (beta=0.1)"),
        ("beta-sweep=standard,wide", "beta-sweep takes one option"),
        ("beta-sweep=standrd", "beta-sweep must be one of none"),
        ("beta=0.1,0.2 trl.bta=1", "did you mean trl.beta?"),
        ("beta=0.1,0.2 hydra.launcher.jbos=2", "hydra.launcher.jbos"),
    ],
)
def test_a_sweep_that_cannot_run_whole_is_refused_with_its_remedy(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan(*words.split())


@pytest.mark.parametrize(("option", "package"), [("slurm", "hydra_submitit_launcher"), ("ray", "hydra_ray_launcher")])
def test_a_cluster_s_launcher_without_its_package_is_refused_naming_it(option, package):
    import importlib.util

    if importlib.util.find_spec(f"hydra_plugins.{package}"):
        assert plan("beta=0.1,0.2", f"hydra/launcher={option}")
        return
    wanted = package.replace("_", "-")
    with pytest.raises(ConfigError, match=f"pip install '{wanted}<"):
        plan("beta=0.1,0.2", f"hydra/launcher={option}")


def test_under_another_sweeper_what_is_not_swept_is_checked_and_the_grid_still_names_the_directory():
    other = "hydra.sweeper._target_=hydra_plugins.x.OptunaSweeper"
    assert directory(other, "beta=interval(0.05,99)") != directory(other, "beta=interval(0.05,0.5)")
    with pytest.raises(ConfigError, match="method must be one of"):
        plan(other, "beta=0.1,0.2", "method=ipoo")


def test_no_option_of_beta_sweep_sets_the_mode_which_hydra_1_4_refuses():
    for file in (ROOT / "conf" / "beta-sweep").glob("*.yaml"):
        assert "mode" not in file.read_text()


def test_help_tells_of_sweeps_and_launchers(command):
    text = command("--help").stdout
    assert "python -m dpo_kit beta-sweep=standard" in text and "none, simpo, standard, wide" in text
    assert "processes, ray, slurm" in text


def test_a_refused_sweep_writes_nothing(command, tmp_path):
    done = command("method=simpo", "beta-sweep=standard")
    assert done.returncode == 2 and "its grid is 2, 2.5, 5, 10" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "per_job", "jobs", "slots"),
    [
        ([], 1, None, [""]),
        ([], 1, 3, ["", "", ""]),
        (["0", "1", "2"], 1, None, ["0", "1", "2"]),
        (["0", "1", "2"], 1, 2, ["0", "1"]),
        (["0", "1", "2", "3", "4"], 2, None, ["0,1", "2,3"]),
        (["0", "0"], 1, None, ["0", "0"]),
    ],
)
def test_jobs_get_whole_slots_of_devices(devices, per_job, jobs, slots):
    assert device_slots(devices, per_job, jobs) == slots


def test_more_devices_per_job_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="at most 2 here, got 4"):
        device_slots(["0", "1"], 4, None)


def test_the_visible_devices_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")
    assert visible_devices() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []


def test_progress_is_read_line_by_line_also_across_a_resume(tmp_path):
    progress, file = Progress(tmp_path), tmp_path / "metrics.jsonl"
    write_json(tmp_path / "trl_config.json", {"max_steps": -1, "num_train_epochs": 2})
    progress.read()
    assert progress.step == 0 and progress.steps() is None and progress.seconds_left() is None
    now = time.time()
    file.write_text(
        f'{{"step": 0, "time": {now - 20}, "epoch": 0, "probe/accuracy": 0.5}}\n'
        f'{{"step": 10, "time": {now}, "epoch": 0.5, "probe/accuracy": 0.7}}\n{{"step": 1'
    )
    progress.read()
    assert (progress.step, progress.steps()) == (10, 40)
    assert progress.figure(["probe/auc", "probe/accuracy"], ".3f") == "0.700"
    assert progress.figure(["probe/auc"], ".3f") == ""
    assert progress.seconds_left() == pytest.approx(60, abs=1)
    with file.open("a") as opened:
        opened.write(f'2, "time": {now + 4}, "epoch": 0.6}}\n')
    progress.read()
    assert progress.step == 12
    aside = tmp_path / "aside"
    aside.write_text(f'{{"step": 5, "time": {now}, "epoch": 0.25}}\n')
    aside.replace(file)
    progress.read()
    assert progress.step == 5


def record(number, **given):
    overrides = [f"beta={0.1 * number:g}", f"trl.learning_rate={number}e-6", "method=dpo", "a.long.key=x"]
    return JobRecord(number, f"run{number}", overrides, beta=0.1, **given)


def test_the_table_fits_100_columns_and_keeps_its_widths(tmp_path):
    jobs = [record(1, state="running"), record(2, state="timed out", seconds=7300.0), record(3)]
    console = Console(width=100, record=True, file=io.StringIO())
    board = Board(tmp_path, jobs)
    console.print(board.table())
    before = console.export_text()
    assert max(map(len, before.splitlines())) <= 100 and "2 h 01 min" in before and "timed out" in before
    write_json(tmp_path / "run1" / "trl_config.json", {"max_steps": 5000})
    (tmp_path / "run1" / "metrics.jsonl").write_text('{"step": 1234, "time": 1, "probe/accuracy": 0.71}\n')
    console.print(board.table())
    after = console.export_text()
    assert "1234/5000" in after and "0.710" in after
    assert after.splitlines()[2].rstrip() == before.splitlines()[2].rstrip()


def test_without_a_terminal_each_running_job_says_now_and_then_how_far_it_is(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dpo_kit.sweep")
    board = Board(tmp_path, [record(1, state="running"), record(2)])
    board.drawn -= 60
    board.tick()
    write_json(tmp_path / "run1" / "trl_config.json", {"max_steps": 48})
    rows = [{"step": 0, "time": time.time() - 150}, {"step": 24, "time": time.time(), "probe/accuracy": 0.645}]
    (tmp_path / "run1" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    board.drawn -= 60
    board.tick()
    board.tick()  # at once again: silent
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "before its first step",
        "step 24 of 48, held-out accuracy 0.645, 2 min left",
    ]


def test_a_job_is_called_by_what_tells_it_from_the_others():
    assert label_jobs([record(1), record(2)]) == ["beta=0.1 learning_rate=1e-6", "beta=0.2 learning_rate=2e-6"]


def test_a_summary_that_fails_is_logged_and_ends_no_sweep(tmp_path, monkeypatch, caplog):
    from dpo_kit.sweep import summary

    monkeypatch.setattr(summary, "write_summary", lambda folder: 1 / 0)
    summary.refresh(tmp_path)
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(("seconds", "text"), [(5.2, "5 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s")])
def test_times_are_said_in_words(seconds, text):
    assert format_seconds(seconds) == text


def test_forked_jobs_share_the_cores_unless_the_user_has_said(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_per_job(jobs) for jobs in (1, 2, 16)] == [None, 4, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_job(2) is None


def test_other_sweepers_get_a_value_for_what_is_done_and_an_error_for_what_is_not(tmp_path, capsys):
    cfg, error = compose(), SweepError("1 of 2 jobs")
    done = Job(JobRecord(0, "a", [], state="done"), cfg, tmp_path, value=0.7).returned(error)
    assert done.return_value == 0.7
    with pytest.raises(SweepError):
        _ = Job(JobRecord(1, "b", [], state="killed"), cfg, tmp_path).returned(error).return_value
    assert capsys.readouterr().err == ""


def test_the_result_of_a_start_that_failed_is_gone_when_the_next_one_begins(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    write_json(run.result, {"status": "failed"})
    monkeypatch.setattr(training, "report_data", lambda data, run: 1 / 0)  # until then it may be refused
    with pytest.raises(ZeroDivisionError):
        training.train(compose(["tracking=none"]), tmp_path)
    assert run.read_result() is None


# --- whole sweeps of a task that takes no time --------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    """Start the real command line with the task of tests/fake_sweep.py."""

    def start(*words, fake="", wait=True):
        (tmp_path / "marks").mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_sweep", *words, "hydra.sweep.dir=sweep"],
            cwd=tmp_path,
            env=os.environ | {"FAKE": fake, "FAKE_ONCE": str(tmp_path / "marks"), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    return start


def jobs_of(tmp_path):
    return {job["beta"]: job for job in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]}


def starts_of(tmp_path, beta):
    file = tmp_path / "sweep" / f"dpo-beta{beta}-seed0" / "starts"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_start(tmp_path, beta):
    until = time.time() + 60
    while not starts_of(tmp_path, beta):
        assert time.time() < until
        time.sleep(0.05)
    time.sleep(0.2)
    return int(starts_of(tmp_path, beta)[0][0])


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_jobs_that_raise_exit_die_or_hang_stop_no_other_and_a_second_start_runs_exactly_them(sweep, tmp_path):
    fake = "0.05=fail 0.1=exit 0.2=kill 0.5=ignore"
    words = ["beta-sweep=wide", "hydra.launcher.timeout_minutes=0.05"]
    done = sweep(*words, fake=fake)
    assert done.returncode == 1
    jobs = jobs_of(tmp_path)
    assert [(jobs[b]["state"], jobs[b]["exit_code"]) for b in GRIDS["wide"]] == [
        ("done", 0),
        ("failed", 1),
        ("failed", 3),
        ("killed", -9),
        ("timed out", -9),
        ("done", 0),
    ]
    assert jobs[0.05]["error"] == "ValueError: this beta fails" and "0.05 minutes" in jobs[0.5]["error"]
    for beta in (0.05, 0.1, 0.2, 0.5):
        assert f"log: sweep/dpo-beta{beta}-seed0/job.log" in done.stderr
    log = (tmp_path / "sweep" / jobs[0.05]["log"]).read_text()
    assert "a line on stdout" in log and "Traceback" in log
    assert "4 of 6 jobs did not end well" in done.stderr and "timed out" in done.stdout
    assert "Error executing job" not in done.stderr and "Traceback" not in done.stderr

    again = sweep(*words, fake=fake)
    assert again.returncode == 0, again.stderr
    jobs = jobs_of(tmp_path)
    assert {beta: len(starts_of(tmp_path, beta)) for beta in GRIDS["wide"]} == {
        **dict.fromkeys((0.01, 1.0), 1),
        **dict.fromkeys((0.05, 0.1, 0.2, 0.5), 2),
    }
    assert {beta: job["before"] for beta, job in jobs.items()} == {b: b in (0.01, 1.0) for b in GRIDS["wide"]}
    assert {job["state"] for job in jobs.values()} == {"done"}
    assert (tmp_path / "sweep" / "multirun.yaml").exists()
    assert not list(tmp_path.rglob(".job*"))


def test_an_exit_with_code_0_before_the_end_is_a_failure_too(sweep, tmp_path):
    assert sweep("-m", "beta=0.1,0.2", fake="0.1=leave").returncode == 1
    assert [job["state"] for job in jobs_of(tmp_path).values()] == ["failed", "done"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupted_sweep_ends_its_jobs_shows_the_table_and_goes_on_later(sweep, tmp_path, number, code):
    words = ["-m", "beta=0.1,0.2,0.5"]
    running = sweep(*words, fake="0.2=hang", wait=False)
    pid = wait_for_start(tmp_path, 0.2)
    running.send_signal(number)
    out, err = running.communicate(timeout=120)
    assert running.returncode == code, err
    assert [job["state"] for job in jobs_of(tmp_path).values()] == ["done", "interrupted", "waiting"]
    assert "1 of 3 jobs done" in out and "Traceback" not in err and not is_alive(pid)
    assert sweep(*words).returncode == 0
    assert [len(starts_of(tmp_path, beta)) for beta in (0.1, 0.2, 0.5)] == [1, 2, 1]


def test_ctrl_c_in_the_middle_of_an_import_exits_with_its_own_code_too(tmp_path):
    script = "from dpo_kit.cli import main as cli\ncli.run = lambda: exec('raise KeyboardInterrupt')\ncli.main()\n"
    (tmp_path / "interrupted.py").write_text(script)
    done = subprocess.run([sys.executable, "-m", "interrupted", "tracking=none"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 130, done.stderr


def test_a_sweep_that_is_killed_takes_its_jobs_along(sweep, tmp_path):
    running = sweep("-m", "beta=0.1,0.2", fake="0.1=hang", wait=False)
    pid = wait_for_start(tmp_path, 0.1)
    running.kill()
    until = time.time() + 20
    while is_alive(pid) and time.time() < until:
        time.sleep(0.1)
    assert not is_alive(pid)
    running.communicate()


def test_a_sweep_is_run_by_one_process_at_a_time(sweep, tmp_path):
    first = sweep("-m", "beta=0.1,0.2", fake="0.1=hang", wait=False)
    wait_for_start(tmp_path, 0.1)
    second = sweep("-m", "beta=0.1,0.2")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    assert second.returncode == 2 and "is being written by process" in second.stderr


def test_with_two_devices_two_jobs_run_at_a_time_each_with_its_own(sweep, tmp_path):
    words = ["-m", "beta=0.05,0.1,0.2", "hydra.launcher.devices=[4,7]"]
    words.append(f"hydra.launcher.command=[env,'MARK=yes','{sys.executable}']")
    assert sweep(*words, fake="0.05=wait 0.1=wait").returncode == 0
    first, second, third = (starts_of(tmp_path, beta)[0] for beta in (0.05, 0.1, 0.2))
    assert {first[2], second[2]} == {"4", "7"} and third[2] in ("4", "7")
    assert {first[5], second[5], third[5]} == {"yes"} and third[4] == "sweep"
    assert float(third[1]) > max(float(first[1]), float(second[1]))


def test_a_sweeper_that_asks_in_batches_gets_one_record(sweep, tmp_path):
    assert sweep("-m", "beta=0.1,0.2,0.5", "hydra.sweeper.max_batch_size=2").returncode == 0
    assert [job["number"] for job in jobs_of(tmp_path).values()] == [0, 1, 2]


def test_a_run_of_another_config_in_the_sweep_s_folder_refuses_the_sweep_and_stays_as_it_is(sweep, tmp_path):
    folder = tmp_path / "sweep" / "dpo-beta0.1-seed0"
    write_json(folder / "result.json", {"status": "done", "final": {}})
    write_json(folder / "manifest.json", {"config": {"beta": 9}})
    done = sweep("-m", "beta=0.1,0.2")
    assert done.returncode == 2 and "dpo-beta0.1-seed0 holds a run of another config" in done.stderr
    assert sorted(path.name for path in (tmp_path / "sweep").rglob("*")) == [
        folder.name,
        "manifest.json",
        "result.json",
    ]


def test_a_run_that_nobody_would_finish_refuses_the_sweep(sweep, tmp_path):
    folder = tmp_path / "sweep" / "dpo-beta0.3-seed0"
    write_json(folder / "manifest.json", {"config": {"beta": 0.3}})
    write_json(folder / "result.json", {"status": "interrupted", "error": "KeyboardInterrupt: "})
    done = sweep("-m", "beta=0.1,0.2")
    assert done.returncode == 2 and "dpo-beta0.3-seed0, not ended and no job of this command" in done.stderr
    write_json(folder / "result.json", {"status": "done", "final": {}})
    assert sweep("-m", "beta=0.1,0.2").returncode == 0  # runs that have ended may be summed up together


# --- real runs ----------------------------------------------------------------------------------------------------


def test_a_sweep_of_two_betas_trains_both_and_the_second_starts_warm(command, tmp_path):
    words = ["-m", "beta=0.05,0.5", *few_pairs(tmp_path / "pairs.jsonl")]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    first, second = (RunDirectory(folder / f"dpo-beta{beta}-seed0") for beta in (0.05, 0.5))
    assert [run.read_result()["status"] for run in (first, second)] == ["done", "done"]
    assert "2 of 2 jobs done" in done.stdout and "4/4" in done.stdout
    stamp = (second.root / "dpo_kit.log").read_text().split(" INFO")[0]
    started = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp()
    assert started - first.result.stat().st_mtime < 1.5
    again = command(*words)
    assert again.returncode == 0 and "2 of 2 jobs were done by an earlier start" in again.stderr


@pytest.mark.slow
def test_a_warm_job_imports_nothing_that_takes_time(tmp_path):
    """Fails when a run needs a module that dpo_kit/sweep/launch/warm.py does not name."""
    words = few_pairs(tmp_path / "pairs.jsonl")
    script = (
        "import sys, dpo_kit.sweep.launch.warm; before = set(sys.modules)\n"
        "from dpo_kit import compose, train; from hydra.utils import get_class\n"
        "from dpo_kit.config.compose import CONF\n"
        f"train(compose({words!r}), {str(tmp_path / 'run')!r})\n"
        "methods = [file.stem for file in (CONF / 'method').glob('*.yaml')]\n"
        "[get_class(compose([f'method={name}']).method.trainer) for name in methods]\n"
        "heavy = ('torch', 'trl', 'transformers', 'datasets', 'matplotlib', 'peft', 'accelerate', 'wandb', 'pandas')\n"
        "print(*[m for m in set(sys.modules) - before if m.split('.')[0] in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    late = set(done.stdout.split())
    assert late <= {"torch.profiler._cupti_monitor"}  # imported with the first profile, in no time
