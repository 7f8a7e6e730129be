"""What the README, its pages in docs/ and the examples tell people to type is typed here."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from dpo_kit.cli import dashboard
from dpo_kit.config.compose import compose
from dpo_kit.data.__main__ import compose_tool
from dpo_kit.data.build.pairs import check_plan
from dpo_kit.run.files import write_jsonl
from dpo_kit.sweep.launch.plan import plan_sweep
from dpo_kit.toy import MODEL, TRAIN
from dpo_kit.toy.domain import DESK_OF
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
ALL = "\n".join([README, *PAGES.values()])
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", ALL, re.S)
COMMANDS = list(
    dict.fromkeys(
        line.split("#")[0].strip()
        for language, block in BLOCKS
        if language == "bash"
        for line in block.splitlines()
        if line.startswith("python -m dpo_kit")
    )
)
STAND_INS = {"path/to/model": str(MODEL), "pairs.jsonl": str(TRAIN)}
CLUSTERS = [command for command in COMMANDS if "hydra/launcher=" in command]
ACCOUNTS = [command for command in COMMANDS if "dpo_kit dashboard " in command]
SERVERS = [command for command in COMMANDS if "base_url" in command]
HUB = [c for c in COMMANDS if "push=" in c or "parts=[gate]" in c or "parts=[alpaca_eval]" in c]
NOT_RUN = [*CLUSTERS, *ACCOUNTS, *SERVERS, *HUB]
BUILDS = [command for command in COMMANDS if "mode=build" in command]
DATA = [command for command in COMMANDS if "dpo_kit data " in command and command not in BUILDS]
EVALUATIONS = [command for command in COMMANDS if "dpo_kit evaluate " in command]
PLANS = [command for command in COMMANDS if "dpo_kit plan " in command]
EXPORTS = [command for command in COMMANDS if "dpo_kit export " in command]
REPORTS = [command for command in COMMANDS if "dpo_kit env" in command]
TOOLS = [*DATA, *BUILDS, *EVALUATIONS, *PLANS, *EXPORTS, *REPORTS]
SWEEPS = [c for c in COMMANDS if ("sweep=" in c or " -m beta" in c) and c not in NOT_RUN + EVALUATIONS]
SHORT = ["trl.max_steps=4", "callbacks.pairs=16", "callbacks.prompts=8"]
FOR_THE_TINY_MODEL = ["allow_learning_rate=true", "trl.learning_rate=1e-4", "trl.num_train_epochs=0.1"]


def _arguments(command):
    for written, real in STAND_INS.items():
        command = command.replace(written, real)
    return shlex.split(command)[3:]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(COMMANDS) >= 5 and len(README.splitlines()) <= 250
    for folder, text in ((ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / link).exists(), link
    assert all(f"(docs/{name})" in README for name in PAGES)


def test_the_speed_that_the_readme_names_is_that_of_the_table():
    rows = dict(re.findall(r"^\| (\S+, full: \w+).*?\| ([\d.]+) \|$", PAGES["measured.md"], re.M))
    named = re.search(
        r"([\d.]+) times as fast on .*?([\d.]+) times\s+on .*?; ([\d.]+) and ([\d.]+) times", README, re.S
    )
    shapes = [f"{shape}, full: {what}" for what in ("training", "sweep") for shape in ("prompt-heavy", "answer-heavy")]
    assert [float(value) for value in named.groups()] == [round(float(rows[shape]), 1) for shape in shapes]
    xeon = dict(re.findall(r"^\| (\S+: \w+).*?\| ([\d.]+) \|$", PAGES["measured.md"], re.M))
    named = re.search(r"it is ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+)\.", README)
    ratios = [round(float(xeon[shape.replace(", full", "")]), 1) for shape in shapes]
    assert [float(value) for value in named.groups()] == ratios


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--" not in c and c not in SWEEPS + NOT_RUN + TOOLS])
def test_every_command_of_the_readme_composes(command):
    compose(_arguments(command))


@pytest.mark.parametrize("command", BUILDS)
def test_every_build_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.jsonl", "votes.jsonl"):
        (tmp_path / name).write_text('{"prompt": "…"}\n')
    check_plan(compose_tool(_arguments(command)[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("written", [command for command in BUILDS if command not in NOT_RUN])
def test_every_build_of_the_readme_runs(written, command, tmp_path):
    (row,) = re.findall(r'`({[^`]*"votes": [^`]*})`', PAGES["data.md"])
    vote = row.replace("\n", " ").replace('"tie"', '"a"').replace('_b": "…', '_b": "other')
    (tmp_path / "votes.jsonl").write_text(vote + "\n")
    done = command(*_arguments(written), "build.limit=20")
    assert done.returncode == 0, done.stderr
    assert "next: python -m dpo_kit data=jsonl" in done.stdout and "Warning" not in done.stderr


def test_what_needs_a_cluster_an_account_or_a_server_says_that_it_was_not_run():
    assert len(CLUSTERS) == 2 and len(ACCOUNTS) == 1 and len(SERVERS) == 3 and len(HUB) == 3
    for line in ALL.splitlines():
        if line.split("#")[0].strip() in NOT_RUN:
            assert "# not run: needs" in line


def test_a_launch_on_several_devices_names_a_file_that_is_there_and_composes():
    (line,) = (line for line in ALL.splitlines() if line.startswith("accelerate launch"))
    words, said = shlex.split(line.split("#")[0]), line.split("#")[1]
    assert said.startswith(" not run: needs") and (ROOT / words[words.index("--config_file") + 1]).exists()
    assert compose(words[words.index("dpo_kit") + 1 :]).experiment.name == "zephyr-7b-dpo"


@pytest.mark.parametrize("command", CLUSTERS)
@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/ray' is validated")
def test_a_sweep_of_the_readme_for_a_cluster_can_be_planned(command):
    package = "submitit" if "slurm" in command else "ray"
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher", reason="needs the extras slurm and ray")
    assert not plan_sweep(_arguments(command), [], "config").local


@pytest.mark.parametrize("command", ACCOUNTS)
def test_the_dashboard_of_the_readme_is_understood(command):
    assert dashboard.parse_words(_arguments(command)[1:])["group"] == "sweep-0123abcd"


@pytest.mark.slow
@pytest.mark.parametrize("written", [command for command in SWEEPS if "dpo_kit sweep " not in command])
def test_every_sweep_of_the_readme_runs_and_is_summed_up_again(written, command, tmp_path):
    done = command(*_arguments(written), *SHORT, "hydra.sweep.dir=swept")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout and "kernels" not in done.stderr
    assert "python -m dpo_kit sweep sweep=outputs/sweep-0123abcd" in SWEEPS
    before = (tmp_path / "swept" / "best.json").read_text()
    again = command("sweep", "sweep=swept")
    assert again.returncode == 0 and (tmp_path / "swept" / "best.json").read_text() == before


@pytest.mark.slow
def test_every_evaluation_of_the_readme_runs(command, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra eval")
    from tests.evaluate.test_harness import write_desks

    write_desks(tmp_path / "tasks", 24)
    rows = [{"prompt": f"Who repairs the {item}?", "label": desk} for item, desk in list(DESK_OF.items())[:16]]
    write_jsonl(tmp_path / "labelled.jsonl", rows)
    assert command("hydra.run.dir=outputs/mine", *SHORT).returncode == 0
    shutil.copytree(tmp_path / "outputs" / "mine", tmp_path / "outputs" / "sweep-0123abcd" / "mine")
    shutil.copytree(tmp_path / "outputs" / "mine" / "model", tmp_path / "path" / "to" / "tuned")
    for written in (each for each in EVALUATIONS if each not in NOT_RUN):
        done = command(*_arguments(written), "win_rate.limit=24")
        assert done.returncode == 0 and "next:" in done.stdout and "Warning" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("written", PLANS)
def test_every_plan_of_the_readme_runs(written, command):
    done = command(*_arguments(written))
    assert done.returncode == 0 and "peak" in done.stdout and "Warning" not in done.stderr, done.stderr


@pytest.mark.slow
def test_what_a_bug_report_needs_is_printed(command):
    (written,) = REPORTS
    done = command(*_arguments(written))
    assert done.returncode == 0 and "| python |" in done.stdout.lower(), done.stdout + done.stderr


@pytest.mark.slow
def test_every_export_of_the_readme_runs(command):
    assert command("hydra.run.dir=outputs/mine", *SHORT).returncode == 0
    for written in (each for each in EXPORTS if each not in NOT_RUN):
        done = command(*_arguments(written))
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("written", ["python -m dpo_kit", *(c for c in COMMANDS if c not in SWEEPS + NOT_RUN + TOOLS)])
def test_every_command_of_the_readme_runs(written, command):
    arguments = _arguments(written)
    if "model=local" in arguments:
        arguments += FOR_THE_TINY_MODEL
    if "--config-dir" in arguments:
        pytest.skip("runs in test_config with a folder of its own")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("written", DATA)
def test_every_data_command_of_the_readme_runs(written, command, tmp_path):
    done = command(*_arguments(written), "out=made")
    assert done.returncode == 0 and "next: " in done.stdout and "Warning" not in done.stderr, done.stderr
    assert len(DATA) == 3 and any((tmp_path / "made").iterdir())


def _table(text):
    """{measure: (end, low, high)} of a run's table, the interval open where it has none."""
    rows = re.findall(r"│ ([a-zA-Z][^│]*?) +│ +\S+ │ +(\S+) │ +(?:\[(\S+), (\S+)\])?", text.replace("−", "-"))
    return {name: (float(end), float(low or "-inf"), float(high or "inf")) for name, end, low, high in rows}


@pytest.mark.slow
def test_the_demo_prints_the_table_of_the_readme(command):
    """Other processors round differently, so: the same measures, each end within the interval that the README shows."""
    shown, found = _table(README), _table(command().stdout)
    assert list(found) == list(shown) and len(shown) == 8
    assert all(shown[name][1] <= end <= shown[name][2] for name, (end, _, _) in found.items())


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path):
    (script,) = {block for language, block in BLOCKS if language == "python"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    accuracy, kl = map(float, done.stdout.splitlines()[-1].split())
    assert accuracy > 0.6 and kl > 0


@pytest.mark.slow
def test_the_callbacks_example_reaches_the_numbers_that_it_states(tmp_path):
    script = str(ROOT / "examples" / "plain_trl.py")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    accuracies = [float(value) for value in re.findall(r"'probe/accuracy': ([\d.]+)", done.stdout)]
    assert accuracies[0] == 0.5 and accuracies[-1] > 0.6


@pytest.mark.slow
def test_the_comparison_of_methods_prints_its_table(tmp_path):
    script = str(ROOT / "examples" / "compare_methods.py")
    small = ["methods=ipo,orpo", "steps=4", "callbacks.pairs=16", "callbacks.prompts=8", "data.gold=null"]
    done = subprocess.run([sys.executable, script, *small], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"│ (ipo|orpo)\s+│ (full|lora)", done.stdout)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("words", [("data.py", "pairs=500"), ("curation.py", "seeds=1", "steps=4")], ids=lambda w: w[0])
def test_the_benchmarks_of_data_print_their_tables(words, tmp_path):
    name, *options = words
    script = [sys.executable, str(ROOT / "examples" / "benchmark" / name), *options]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and ("pairs a second" in done.stdout or "curated" in done.stdout), done.stderr


@pytest.mark.slow
def test_the_benchmark_of_checkpoints_prints_its_table(tmp_path):
    script = [sys.executable, str(ROOT / "examples" / "benchmark" / "checkpoints.py"), "runs=1", "steps=2", "every=1"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and len(re.findall(r"│ (embedded|57M)\s+│ (full|lora)", done.stdout)) == 4, done.stderr


@pytest.mark.slow
def test_the_benchmark_of_speed_prints_its_table(tmp_path):
    words = ["part=limit", "repeats=1", "pairs=8"]
    script = [sys.executable, str(ROOT / "examples" / "benchmark" / "speed.py"), *words]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0 and done.stdout.count("a step on the same packed tokens") == 2, done.stderr


@pytest.mark.slow
def test_the_benchmark_prints_its_table(tmp_path):
    script = str(ROOT / "examples" / "benchmark" / "bench.py")
    done = subprocess.run(
        [sys.executable, script, "measured_steps=6"], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "the probe's share" in done.stdout, done.stderr
