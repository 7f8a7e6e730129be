"""Files, folders and modules that a config names are looked at before anything is loaded or written."""

import importlib
import os
import re
import resource
import socket
import subprocess
import sys

import pytest

from dpo_kit.cli import main as cli
from dpo_kit.cli.main import read_arguments, refuse_early
from dpo_kit.config.compose import check, compose
from dpo_kit.config.identity import comparable
from dpo_kit.config.places import claim, refuse_foreign, refuse_no_file, refuse_unwritable
from dpo_kit.errors import ConfigError, DataError, ModelError
from dpo_kit.model.origin import refuse_unusable
from dpo_kit.run.files import cache_folder, write_json
from dpo_kit.toy import MODEL
from tests.small import write_pairs


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pairs, a model, a folder without one, a file."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "model").symlink_to(MODEL)
    return tmp_path


REFUSED = {
    "data=jsonl data.train=pair.jsonl": "data.train=pair.jsonl: no such file or folder; did you mean pairs.jsonl?",
    "data=jsonl data.train=nothing": "data.train=nothing has no .jsonl",
    "data=jsonl data.train=notes.txt": "unknown kind of file",
    "data=jsonl data.train=a/b/c": "data.train=a/b/c: no such file or folder",
    "data=jsonl data.train=[{path: pairs.jsonl}, {path: ./nothin}]": "./nothin: no such file or folder; did you mean n",
    "data=jsonl data.train=pairs.jsonl data.eval=./eval": "data.eval=./eval",
    "data.benchmark=bench.jsonl": "data.benchmark=bench.jsonl",
    "data.gold=json.tol": "there is no module json.tol",
    "model=local model.path=./modle": "model.path=./modle does not exist; did you mean model?",
    "model=local model.path=./modle/model": "does not exist; did you mean model?",
    "model=local model.path=notes.txt": "is a file, not a folder",
    "model=local model.path=nothing": "has no config.json",
    "model.reference=./other": "model.reference=./other does not exist",
    "model.chat_template=chat.jinja": "model.chat_template=chat.jinja: no such file",
    "trl.accelerator_config=acc.json": "trl.accelerator_config=acc.json: no such file",
    "trl.fsdp_config=nothing": "is a folder: name a file in it",
    "resume=checkpoints/checkpoint-3": "resume must be auto, never or a checkpoint folder",
    "method=online_dpo judge=reward_model judge.path=./judge": "judge.path=./judge does not exist",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_there_is_refused_with_key_and_near_miss(words, here):
    settings = check(compose(re.sub(r"([:,]) ", r"\1", words).split(" ")))
    with pytest.raises((ConfigError, ModelError)) as refusal:
        refuse_unusable(settings)
    assert REFUSED[words] in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data=jsonl", "data.train=pairs.jsonl", "model=local", "model.path=model"],
        ["data=jsonl", "data.train=org/pairs", "model=local", "model.path=org/model"],  # left to the hub
        ["model.chat_template={{ messages }}", "trl.accelerator_config={split_batches: true}"],
    ],
)
def test_what_is_there_or_of_the_hub_passes(words, here):
    refuse_unusable(check(compose(words)))


def test_a_mistyped_path_is_refused_at_once_and_leaves_nothing(command, tmp_path):
    script = "import sys, dpo_kit.cli.main as c; sys.argv[1:] = ['data.train=pair.jsonl']\ntry: c.main()\n"
    script += "except SystemExit as end: print(end.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "2 []" and "no such file" in done.stderr, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # seconds of work
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_is_refused_later_leaves_no_folder_of_its_own_and_spares_others(tmp_path, monkeypatch):
    def refused():
        (folder / ".hydra").mkdir(parents=True)
        cli.held.append(DataError("row 1"))

    monkeypatch.setattr(cli, "run", refused)
    for folder, kept in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if kept:
            folder.mkdir()
            (folder / "metrics.jsonl").touch()
        with pytest.raises(DataError):
            cli._single(folder)
        assert folder.exists() == kept


def test_where_nothing_can_be_written_is_refused_by_the_key_that_named_it(here, monkeypatch):
    refuse_unwritable("out", "new/er")
    with pytest.raises(ConfigError, match=r"out=notes\.txt/x: .*notes\.txt is a file, not a folder"):
        refuse_unwritable("out", "notes.txt/x")
    with pytest.raises(ConfigError, match=r"out=nothing is a folder: name a file, out=nothing/out\.json"):
        refuse_no_file("out", "nothing")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"out=new cannot be written .* is read-only here"):
        refuse_unwritable("out", "new")


def test_two_starts_within_one_second_do_not_share_a_folder(tmp_path):
    stamp = tmp_path / "outputs" / "20300101-000000"
    assert [claim(stamp).name for _ in range(3)] == [stamp.name, f"{stamp.name}-2", f"{stamp.name}-3"]


def start(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo_kit"])
    refuse_early(read_arguments(words))
    return sys.argv[1:]


def test_a_time_stamp_is_taken_at_once_and_a_typed_folder_is_left_as_it_is(here, monkeypatch):
    monkeypatch.setattr(cli, "claim", lambda folder: folder.with_name("mine"))
    assert start(["seed=1"], monkeypatch) == ["seed=1", "hydra.run.dir=outputs/mine"]
    assert start(["seed=1", "hydra.run.dir=r"], monkeypatch) == ["seed=1", "hydra.run.dir=r"]
    assert not (here / "r").exists()
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=notes\.txt: .* is a file"):
        start(["hydra.run.dir=notes.txt"], monkeypatch)


def test_a_refused_start_changes_nothing_in_the_run_directory_that_is_there(here, monkeypatch):
    write_json(here / "r" / "manifest.json", {"config": comparable(check(compose(["beta=0.2"])))})
    with pytest.raises(ConfigError, match=r"holds a run of another config \(beta: 0\.2 there, 0\.1 now"):
        start(["hydra.run.dir=r"], monkeypatch)
    (here / "s").mkdir()
    (here / "s" / ".lock").write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
    with pytest.raises(ConfigError, match=f"s is being written by process {os.getpid()} on"):
        start(["hydra.run.dir=s"], monkeypatch)
    assert sorted(path.name for path in here.rglob("[rs]/*")) == [".lock", "manifest.json"]


def test_a_folder_of_somebody_else_is_no_place_to_write_and_one_s_own_is(here):
    refuse_foreign("out", "new")
    (here / "nothing" / "thesis.pdf").touch()
    with pytest.raises(ConfigError, match=r"out=nothing is a folder with other files in it \(thesis\.pdf\)"):
        refuse_foreign("out", "nothing")
    (here / "nothing" / "data_report.json").touch()
    refuse_foreign("out", "nothing")
    (here / "nothing" / "metrics.jsonl").touch()  # a run, whose result.json would be overwritten
    with pytest.raises(ConfigError, match=r"\(metrics\.jsonl\)"):
        refuse_foreign("out", "nothing")


@pytest.mark.parametrize(
    ("tool", "words"),
    [("env", []), ("plan", []), ("data", []), ("evaluate", ["policy=model", "reference=model"]), ("export", ["run=r"])],
)
def test_every_tool_refuses_a_place_that_is_none(tool, words, here, capsys):
    main = importlib.import_module(
        f"dpo_kit.cli.{tool}" if tool in ("env", "plan") else f"dpo_kit.{tool}.__main__"
    ).main
    assert main([*words, "out=notes.txt/x"]) == 2
    assert "notes.txt is a file, not a folder" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_replaced_and_said_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "file" / "cache"))
    folders = [cache_folder(name) for name in ("tokens", "reference")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert folders[0].parent == folders[1].parent
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"{tmp_path}/file/cache cannot be written"
    ]
