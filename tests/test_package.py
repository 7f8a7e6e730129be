"""The wheel: conf/ travels in it, and the command works from any folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from site import getsitepackages

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_conf_and_the_embedded_lab(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "dpo_kit/conf/config.yaml",
        "dpo_kit/conf/method/dpo.yaml",
        "dpo_kit/toy/model/model.safetensors",
        "dpo_kit/py.typed",
        "hydra_plugins/dpo_kit_launcher/launcher.py",
    } <= names
    assert not any(name.startswith(("tests/", "examples/")) for name in names)


def test_the_wheel_composes_in_another_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dpo_kit", "method=simpo", "--cfg", "job", "--resolve"],
        cwd=tmp_path / "work",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"path: {tmp_path / 'site'}" in done.stdout, done.stderr
    assert "simpo_gamma: 1.0" in done.stdout


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """An environment with the wheel and what it needs, but without this checkout: its folder of commands.

    The needed packages are those of the outer environment; a .pth file of theirs, such as the one that leads to the
    checkout, counts for nothing there.
    """
    root = tmp_path_factory.mktemp("clean")
    venv.create(root, symlinks=True)
    python = root / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
    (site / "outer.pth").write_text("".join(f"{path}\n" for path in getsitepackages()))
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, capture_output=True)
    return root / "bin"


LAB = ["tracking=none", "trl.max_steps=20", "callbacks.pairs=64", "callbacks.prompts=32"]
FROM_THE_WHEEL = (  # what is typed, and what must then be there
    (["python", "-m", "dpo_kit", "hydra.run.dir=mine", *LAB], "mine/model/model.safetensors"),
    (["dpo-kit", "-m", "beta=0.05,0.5", "hydra.sweep.dir=swept", *LAB], "swept/best.json"),
    (["dpo-kit", "evaluate", "run=mine", "win_rate.limit=24"], "mine/evaluation/result.json"),
    (["python", "-m", "dpo_kit", "evaluate", "sweep=swept", "win_rate.limit=24"], "swept/summary.md"),
    (["python", "-m", "dpo_kit", "export", "run=mine"], "mine/export/model.safetensors"),
    (["python", "-m", "dpo_kit", "export", "run=mine", "mode=script"], "mine/reproduce/reproduce.py"),
    (["python", "-m", "dpo_kit", "data", "out=report"], "report/data_report.json"),
    (["python", "-m", "dpo_kit", "plan", "out=plan.json"], "plan.json"),
    (["python", "-m", "dpo_kit", "dashboard", "--help"], "."),
    (["dpo-kit", "--help"], "."),
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_alone_trains_sweeps_evaluates_and_exports_in_another_folder(clean, tmp_path):
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    where = "import dpo_kit, hydra_plugins.dpo_kit_launcher as h; print(dpo_kit.__file__, h.__file__)"
    for words, file in ((["python", "-c", where], "."), *FROM_THE_WHEEL):
        words = [str(clean / words[0]), *words[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0 and (tmp_path / file).exists(), (words, done.stderr)
        assert str(ROOT) not in done.stdout + done.stderr
        if words[1] == "-c":
            assert done.stdout.count(str(clean.parent)) == 2


def test_the_console_script_answers_and_completes():
    script = str(Path(sys.executable).parent / "dpo-kit")
    version = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("dpo_kit 0.")
    tool = subprocess.run([script, "sweep", "swep=x"], capture_output=True, text=True)
    assert tool.returncode == 2 and "did you mean sweep?" in tool.stderr
    line = "dpo-kit method=ip"
    query = subprocess.run(
        [script, "-sc", "query=bash"],
        env=os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
        capture_output=True,
        text=True,
    )
    assert query.stdout.split() == ["method=ipo"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dpo-kit experiment=zephyr", ["experiment=zephyr-7b-dpo", "experiment=zephyr-7b-dpo-qlora"]),
        ("dpo-kit trl.warmup_st", ["trl.warmup_steps="]),
        ("dpo-kit evaluate run=", []),
        ("dpo-kit nonsense ", []),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_tab_in_bash_offers_what_fits_and_never_a_traceback(line, offered):
    folder = Path(sys.executable).parent
    script = (
        'eval "$(dpo-kit -sc install=bash)"; complete -p dpo-kit >/dev/null || exit 1; '
        'export COMP_LINE="$LINE"; COMP_WORDS=($COMP_LINE); '
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); hydra_bash_completion; printf '%s\\n' ${COMPREPLY[@]}"
    )
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, offered, "")


def _installed(name, extras, seen):
    """{package: version} of what is installed of `name[extras]` and all that it needs."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    try:
        found = distribution(name)
    except PackageNotFoundError:  # an extra that this environment does without
        return
    if extras <= seen.get(key, (None, frozenset()))[1] and key in seen:
        return
    seen[key] = (found.version.partition("+")[0], extras)
    for text in found.requires or []:
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            _installed(need.name, frozenset(need.extras), seen)


def test_the_constraints_pin_exactly_what_is_installed_here_with_every_extra():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line.split("==")[1] for line in lines}
    found = {}
    _installed("dpo-kit", frozenset({"dev", "dashboard", "slurm", "ray", "serve", "eval"}), found)
    open_ones = {"dpo-kit", "setuptools"}  # this, what came with Python
    differing = {name: version for name, (version, _) in found.items() if pins.get(name) != version}
    assert differing.keys() - open_ones == set() and len(found) > 60


SCRIPT = """
from dpo_kit import (
    ConfigError, DataError, DpoKitError, ImplicitReward, KLDrift, ModelError, PairProbe, PreferenceMargin, Result,
    TrainingError, compose, train,
)


def run(beta: float) -> float:
    try:
        result: Result = train(compose([f"beta={beta}"], config_dir=None), "outputs/mine")
    except (ConfigError, DataError, ModelError, TrainingError) as error:
        assert isinstance(error, DpoKitError)
        raise SystemExit(str(error)) from error
    makers = [PreferenceMargin, ImplicitReward, KLDrift, PairProbe]
    assert_type(result.final["probe/accuracy"], float)
    return result.final["probe/accuracy"] + len(makers)


run("0.1")
"""


@pytest.mark.slow
def test_a_user_s_strictly_typed_script_passes_mypy_and_a_wrong_call_does_not(tmp_path):
    (tmp_path / "mine.py").write_text(f"from typing import assert_type\n{SCRIPT}")
    words = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "mine.py"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    (said, total) = done.stdout.splitlines()
    assert 'error: Argument 1 to "run" has incompatible type "str"; expected "float"' in said and "1 error" in total


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_only_make_test_all_installs_the_extras(tmp_path):
    def told(target):
        words = ["make", "-n", "-C", str(ROOT), f"VENV={tmp_path / 'none'}", target]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert "'.[dev,dashboard,slurm,ray,serve,eval]'" in told("test-all")
    assert "'.[dev]'" in told("test") and "ray" not in told("test") + told("demo")
