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
from dpo_kit.config.places import claim, refuse_unwritable
from dpo_kit.config.tools import refuse_existing, refuse_foreign, refuse_no_file
from dpo_kit.data.__main__ import main as data_tool
from dpo_kit.errors import ConfigError, DataError, ModelError
from dpo_kit.evaluate import __main__ as evaluation
from dpo_kit.evaluate.job import Candidate
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
    "data=jsonl data.train=peer*.jsonl": "data.train=peer*.jsonl: no such file or folder",
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
    "method=online_dpo judge.module=json.tol": "judge.module=json.tol: there is no module json.tol",
}


IN_EVALUATION = {
    "policy=./modle reference=model": "policy=./modle does not exist; did you mean model?",
    "policy=model reference=./base": "reference=./base does not exist",
    "policy=model reference=model against=./modle": "against=./modle does not exist; did you mean model?",
    "policy=model reference=model against=answer.jsonl": "against=answer.jsonl: no such file or folder; did you mean a",
    "policy=model reference=model parts=[win_rat]": "did you mean win_rate?",
    "policy=model reference=model win_rate.prompts=pair.jsonl": "win_rate.prompts=pair.jsonl: no such file or folder",
    "policy=model reference=model judge=reward_model judge.path=./judge": "judge.path=./judge does not exist",
    "policy=model reference=model judge.module=json.tol": "judge.module=json.tol: there is no module json.tol",
    "policy=model reference=model parts=[domain] domain.file=label.jsonl": "no such file or folder: label.jsonl",
    "run=modle": "run=modle is no run directory",
}


@pytest.mark.parametrize("words", IN_EVALUATION)
def test_an_evaluation_looks_at_what_it_is_given_before_anything_is_drawn(words, here, monkeypatch):
    (here / "answers.jsonl").touch()
    monkeypatch.setattr(Candidate, "tokenizer", lambda self: pytest.fail("a tokenizer was loaded"))
    with pytest.raises((ConfigError, DataError)) as refusal:
        evaluation.work(words.split(" "))
    assert IN_EVALUATION[words] in str(refusal.value)


NOBODY = "judge=llm judge.model=m judge.base_url=http://localhost:1/v1"
MINE, NO_ANSWER = "data=jsonl data.train=pairs.jsonl", "judge.base_url=http://localhost:1/v1: nobody answers there"
AT_ONCE = {  # what each tool refuses without torch, by its words
    "cli.main": {
        "data=jsonl data.train=pair.jsonl": "did you mean pairs.jsonl?",
        f"{MINE} data.eval=peers.jsonl": "data.eval=peers.jsonl: no such file or folder; did you mean pairs.jsonl?",
        "model=local model.path=modle/": "model.path=modle/ does not exist; did you mean model?",
        "data=jsonl data.train=notes.txt": "unknown kind of file",
        "tracking=tensorboard": "pip install tensorboard",
        "hydra.run.dir=notes.txt": "is a file, not a folder",
        f"method=online_dpo {NOBODY}": NO_ANSWER,
    },
    "cli.main of a sweep": {
        "-m seed=0,1 data=jsonl data.train=pair.jsonl": "did you mean pairs.jsonl?",
        "-m seed=0,1 hydra.sweep.dir=notes.txt": "is a file, not a folder",
        "-m seed=0,1 tracking=tensorboard": "pip install tensorboard",
        f"-m seed=0,1 method=online_dpo {NOBODY}": NO_ANSWER,
    },
    "sweep.__main__": {
        "sweep=nowhere": "nowhere",
        "sweep=nothing ideal=note.txt": "ideal=note.txt: no such file or folder; did you mean notes.txt?",
    },
    "data.__main__": {
        "data=jsonl data.train=pair.jsonl": "did you mean pairs.jsonl?",
        f"{MINE} data.form=hh_rlfh": "did you mean hh_rlhf?",
        f"{MINE} out=notes.txt": "is a file, not a folder",
        "mode=build build.prompts=pair.jsonl": "build.prompts=pair.jsonl: no such file or folder; did you mean pairs",
        f"mode=build build.prompts=pairs.jsonl {NOBODY}": NO_ANSWER,
    },
    "evaluate.__main__": {
        "run=modle": "run=modle is no run directory",
        "policy=./modle reference=model": "did you mean model?",
        f"policy=model reference=model {MINE} data.eval=pair.jsonl": "data.eval=pair.jsonl: no such file or folder",
        "policy=model reference=model parts=[gate]": "lm-eval",
        "policy=model reference=model out=notes.txt": "is a file, not a folder",
        f"policy=model reference=model parts=[win_rate] {NOBODY}": NO_ANSWER,
    },
    "export.__main__": {
        "run=modle": "run=modle is no run directory",
        "run=nothing out=notes.txt": "is a file, not a folder",
        "run=nothing out=model": "out=model is a folder with other files in it (config.json)",
        "run=nothing mode=script out=nothing": "out=nothing is there already",
        "run=nothing dtype=bf16": "dtype must be one of auto, float32, bfloat16, float16, got bf16",
    },
    "cli.plan": {"method=ktoo": "did you mean kto?", "out=nothing": "out=nothing is a folder"},
}


@pytest.mark.parametrize("tool", AT_ONCE)
def test_what_is_certainly_wrong_is_refused_by_every_tool_before_torch_is_imported(tool, here):
    module = f"dpo_kit.{tool.split()[0]}"
    script = f"""
import sys, {module}
sys.modules |= dict.fromkeys(("lm_eval", "tensorboard"))  # as if they were not installed
for words in {list(AT_ONCE[tool])!r}:
    sys.argv[1:] = words.split()
    try:
        code = {module}.main()
    except SystemExit as end:
        code = end.code
    print(code, *sorted({{"torch", "transformers", "trl", "datasets"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2"] * len(AT_ONCE[tool]), done.stdout + done.stderr
    said = done.stderr.split(": refused: ")[1:]
    assert [wanted for wanted, refusal in zip(AT_ONCE[tool].values(), said, strict=True) if wanted not in refusal] == []
    assert {path.name for path in here.iterdir()} == {"pairs.jsonl", "notes.txt", "nothing", "model"}


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
        ["data=jsonl", "data.train=pair*.jsonl", "data.eval=**/[p]airs.jsonl"],
        ["data=jsonl", "data.train=org/pairs", "model=local", "model.path=org/model"],  # left to the hub
        ["model.chat_template={{ messages }}", "trl.accelerator_config={split_batches: true}"],
    ],
)
def test_what_is_there_or_of_the_hub_passes(words, here):
    refuse_unusable(check(compose(words)))


def test_a_mistyped_path_is_refused_at_once_and_leaves_nothing(command, tmp_path):
    script = "import sys, dpo_kit.cli.main as c; sys.argv[1:] = ['data.train=pair.jsonl']\ntry: c.main()\n"
    script += "except SystemExit as end: print(end.code, [m for m in ('torch', 'transformers') if m in sys.modules])"

    def seconds_of_work():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == "2 []" and "no such file" in done.stderr, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds_of_work() < 1.5 for _ in range(5))  # others on the same cores make work dearer
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


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 2500 + "y.jsonl", "~nobody-of-this-name/x"])
def test_a_path_that_the_machine_can_not_have_is_refused_by_its_key(path, here):
    for refuse in (refuse_unwritable, refuse_foreign, refuse_no_file, refuse_existing):
        with pytest.raises(ConfigError, match=r"^out=.* can be no place on this machine: "):
            refuse("out", path)
    for key, more in (("data.train", ["data=jsonl"]), ("model.path", ["model=local"]), ("resume", [])):
        with pytest.raises(ConfigError, match=rf"{key}=.* can be no place on this machine: "):
            refuse_unusable(check(compose([*more, "data.train=pairs.jsonl", f"{key}={path}"])))


def test_two_starts_within_one_second_do_not_share_a_folder(tmp_path):
    stamp = tmp_path / "outputs" / "20300101-000000"
    assert [claim(stamp).name for _ in range(3)] == [stamp.name, f"{stamp.name}-2", f"{stamp.name}-3"]


def test_two_data_reports_within_one_second_do_not_share_a_folder_and_a_refused_one_leaves_none(here, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "20300101-000000"))
    words = ["data=jsonl", "data.train=pairs.jsonl", "data.holdout=0.4", "mode=convert"]
    assert data_tool(words) == data_tool(words) == 0
    assert sorted(path.name for path in (here / "outputs").iterdir()) == [
        "data-20300101-000000",
        "data-20300101-000000-2",
    ]
    (here / "pairs.jsonl").write_text("{\n")
    assert data_tool(words) == 2 and len([*(here / "outputs").iterdir()]) == 2


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
    with pytest.raises(ConfigError, match=f"s is being written by process {os.getpid()} on"):
        start(["-m", "beta=0.1,0.2", "hydra.sweep.dir=s"], monkeypatch)  # before Hydra writes what was typed
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
    ("tool", "words", "key"),
    [
        ("data", [], "out=outputs"),
        ("evaluate", ["policy=model", "reference=model"], "out=outputs/evaluation-"),
        ("export", ["run=r"], "out=r/export"),
        ("export", ["run=r", "mode=script"], "out=r/reproduce"),
        ("sweep", ["sweep=s"], "sweep=s"),
    ],
)
def test_every_tool_refuses_at_once_to_write_where_it_cannot_by_itself(tool, words, key, here, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    assert importlib.import_module(f"dpo_kit.{tool}.__main__").main(words) == 2
    said = capsys.readouterr().err
    assert key in said and "cannot be written" in said


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
