"""The wheel: conf/ travels in it, and the command works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_the_console_script_answers_and_completes():
    script = str(Path(sys.executable).parent / "dpo-kit")
    version = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("dpo_kit 0.")
    line = "dpo-kit method=ip"
    query = subprocess.run(
        [script, "-sc", "query=bash"],
        env=os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
        capture_output=True,
        text=True,
    )
    assert query.stdout.split() == ["method=ipo"]
