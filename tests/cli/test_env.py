"""What a bug report says of the machine: true, quick, and without a secret."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from dpo_kit.cli import env
from dpo_kit.cli.env import (
    describe_devices,
    describe_environment,
    describe_packages,
    describe_processor,
    main,
    to_markdown,
)

SECRET = "hf_" + "canary" * 5
DEVICES = {"nvidia_smi": ["H100, 81559 MiB, 570.1"], "gpus": ["H100"], "torch_cuda": "12.8", "precision": "bfloat16"}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(env, "describe_devices", lambda: DEVICES)


def test_only_variables_that_matter_are_told_and_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    told = describe_environment(
        {
            "HF_TOKEN": SECRET,
            "MY_API_KEY": "swordfish",
            "HF_HOME": f"{tmp_path}/models",
            "WANDB_BASE_URL": "https://me:swordfish@example.org",
            "DPO_KIT_CACHE": "",
            "EDITOR": "vi",
            "LS_COLORS": "x",
        }
    )
    assert told == {
        "DPO_KIT_CACHE": "",
        "HF_HOME": "~/models",
        "HF_TOKEN": "<redacted>",
        "MY_API_KEY": "<redacted>",
        "WANDB_BASE_URL": "https://<redacted>@example.org",
    }


def test_packages_are_those_that_the_project_names_in_the_versions_installed_here():
    packages, extras = describe_packages()
    assert {name: version(name) for name in packages} == packages and {"trl", "torch", "peft"} <= packages.keys()
    assert {"dev", "eval", "ray", "slurm", "serve", "dashboard"} <= extras.keys() and extras["dev"]


def test_an_extra_that_lacks_a_package_is_not_whole(monkeypatch):
    monkeypatch.setattr(
        env, "requires", lambda name: ["trl", "nowhere-at-all; extra == 'more'", "trl; extra == 'more'"]
    )
    packages, extras = describe_packages()
    assert packages.keys() == {"trl"} and extras == {"more": False}


def test_a_checkout_that_is_not_installed_is_told_not_raised(quick, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(env, "requires", missing)
    monkeypatch.setattr(env, "distribution", missing)
    found = env.describe()
    assert found["packages"] == {} and "| dpo_kit | not installed" in to_markdown(found)


def test_the_size_of_the_cache_counts_whole_files_once_and_not_those_that_vanish(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "kept").write_bytes(b"12345")
    (tmp_path / "sub" / "kept").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    walked = [(str(tmp_path), ["sub"], ["kept", "link", "gone"]), (str(tmp_path / "sub"), [], ["kept"])]
    monkeypatch.setattr(env.os, "walk", lambda folder: walked)
    assert env._size(tmp_path) == 8


def test_a_torch_that_cannot_be_imported_is_told_not_raised(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = describe_devices()
    assert found["torch"].startswith("cannot be imported: ModuleNotFoundError")
    whole = {**env.describe(), "devices": found}
    assert "| torch | cannot be imported" in to_markdown(whole)


def test_the_processor_has_a_name_cores_and_memory():
    found = describe_processor()
    assert found["name"] and found["cores"] >= 1 and found["memory_gib"] >= found["free_gib"] > 0


def test_the_command_prints_markdown_and_writes_json(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert main([f"out={tmp_path / 'env.json'}"]) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "env.json").read_text()
    assert printed.startswith("### Environment of dpo_kit\n\n|") and "| GPUs | H100, 81559 MiB, 570.1 |" in printed
    assert f"trl {version('trl')}" in printed and json.loads(written)["packages"]["trl"] == version("trl")
    assert SECRET not in printed + written and "| `HF_TOKEN` | `<redacted>` |" in printed


@pytest.mark.parametrize(("words", "said"), [(["ot=x"], "did you mean out?"), (["x"], "did you mean out=x?")])
def test_a_wrong_word_is_refused(words, said, capsys):
    assert main(words) == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_env_is_a_tool_of_the_command(command):
    done = command("env")
    assert done.returncode == 0 and "| precision |" in done.stdout, done.stderr
