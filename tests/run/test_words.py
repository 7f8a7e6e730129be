"""Words of a command line: as people type them, as Hydra reads them, as they are printed to be typed next."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString

from dpo_kit.cli.main import read_arguments
from dpo_kit.cli.plan import split_words
from dpo_kit.config.compose import check, compose, compose_unchecked
from dpo_kit.config.explain import known_keys, unknown_key
from dpo_kit.config.tools import parse
from dpo_kit.errors import ConfigError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.other_tools import MEANT
from dpo_kit.run.processes import launcher
from dpo_kit.run.report.diagnosis import loss_flat
from dpo_kit.run.words import again, command, longer, override, readable, training
from dpo_kit.trainer.finish import next_command
from dpo_kit.trainer.resume.go_on import how_to_go_on

TYPED = "python -m dpo_kit method=ipo 'data.train=my pairs.jsonl' beta=0.1 trl.num_train_epochs=3 hydra.run.dir=here"


def saturation(*values):
    return [{"step": step, "probe/saturation": value} for step, value in enumerate(values)]


def test_what_was_typed_comes_back_with_the_changed_keys():
    assert again(TYPED, "ipo", "-m", beta="0.1,0.5", seed="0,1") == (
        "python -m dpo_kit -m method=ipo 'data.train=my pairs.jsonl' trl.num_train_epochs=3 beta=0.1,0.5 seed=0,1"
    )
    assert again(None, "kto", seed="1") == "python -m dpo_kit method=kto seed=1"  # from Python nothing was typed


@pytest.mark.parametrize(
    ("trl", "override"),
    [
        ({"max_steps": 150, "num_train_epochs": 1}, {"trl.max_steps": "300"}),
        ({"max_steps": -1, "num_train_epochs": 1.5}, {"trl.num_train_epochs": "3"}),
        ({}, {"trl.num_train_epochs": "2"}),
    ],
)
def test_twice_as_long_counts_steps_where_they_are_set(trl, override):
    assert longer(trl) == override


def test_no_sweep_is_named_where_beta_is_not_felt():
    settings = check(compose(["method=ipo", "trl.num_train_epochs=3"]))
    grid = ",".join(f"{value:g}" for value in settings.method.beta.grid)
    kept = "method=ipo 'data.train=my pairs.jsonl'"
    felt = next_command(settings, TYPED, saturation(0.0, 0.3))
    assert felt == f"python -m dpo_kit -m {kept} trl.num_train_epochs=3 beta={grid}"
    unfelt = next_command(settings, TYPED, saturation(0.0, 0.02))
    assert unfelt == f"python -m dpo_kit {kept} beta=0.1 trl.num_train_epochs=6"


ODD_PATHS = [
    "v=2/a.jsonl",
    "数据/é.jsonl",
    "new [1]/{x}.jsonl",
    "it's here.jsonl",
    'say "so".jsonl',
    "a;b&c.jsonl",
    "x (1).jsonl",
]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_a_path_that_hydra_s_grammar_does_not_take_is_taken_as_it_is(path):
    assert compose_unchecked(["data=jsonl", f"data.train={path}"]).data.train == path


def test_a_home_folder_is_meant_by_its_sign_also_inside_lists(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert readable(["data.train=~/a.jsonl"]) == ["data.train=/home/somebody/a.jsonl"]
    assert readable(["data.train=[{path: ~/a.jsonl}]"]) == ["data.train=[{path: /home/somebody/a.jsonl}]"]
    assert readable(["model.path=x~/y"]) == ["model.path='x~/y'"]  # not at the start: a name
    assert readable(["~trl.beta"]) == ["~trl.beta"]  # Hydra's own: takes the key out


@pytest.mark.parametrize("text", [*ODD_PATHS, "end\\", r"a\'b", "", "${x}", "~/x", "1,2"])
def test_what_is_printed_is_read_again_as_it_was(text):
    (word,) = shlex.split(command(override("key", text)))[3:]
    assert OverridesParser.create().parse_override(word).value() in (text, text and QuotedString(text, Quote.single))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beta=0.2"], "without dashes: beta=0.2"),
        (["--lr", "1e-5"], "without dashes: trl.learning_rate=1e-5"),
        (["seed=1", "--dataset_name", "pairs.jsonl", "beta=1"], "without dashes: data.train=pairs.jsonl"),
        (["--use-lora"], "without dashes: model.tuning=…"),
        (["beta"], "overrides are key=value, got 'beta'"),
        (["=3"], "overrides are key=value, got '=3'"),
        (["--run_name=a", "-q"], "without dashes: tracking.name=a"),
    ],
)
def test_words_that_are_no_overrides_are_answered_with_the_one_that_was_meant(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_arguments(words)


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        ("export", ["--run=outputs/mine"], "without dashes: run=outputs/mine"),
        ("cli.env", ["--out", "f.json"], "without dashes: out=…"),
        ("data", ["--dataset_name", "p.jsonl"], "without dashes: data.train=p.jsonl"),
        ("evaluate", ["--run", "outputs/mine"], "without dashes: run=outputs/mine"),
        ("cli.plan", ["beta=0.2", "--lr", "1e-5"], "without dashes: trl.learning_rate=1e-5"),
    ],
)
def test_flags_of_other_tools_are_answered_by_every_tool(tool, words, said, capsys):
    module = importlib.import_module(f"dpo_kit.{tool}" + ("" if "." in tool else ".__main__"))
    assert module.main(words) == 2 and said in capsys.readouterr().err


def test_a_mistyped_tool_is_answered_with_the_one_that_is_meant():
    with pytest.raises(ConfigError, match=r"there is no tool evalute; did you mean evaluate\?"):
        read_arguments(["evalute", "run=outputs/mine"])


def test_a_home_folder_is_meant_by_its_sign_in_every_tool(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse(["run=~/mine"], ["run"]) == {"run": "/home/somebody/mine"}
    assert split_words(["out=~/plan.json", "beta=1"]) == ({"out": "/home/somebody/plan.json"}, ["beta=1"])


def test_flags_and_overrides_may_stand_in_any_order(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo_kit"])
    args = read_arguments(["seed=1", "-m", "beta=0.1,0.2", "--config-dir", "mine", "data.train=a=b"])
    assert (args.multirun, args.config_dir) == (True, "mine")
    assert args.overrides == ["seed=1", "beta=0.1,0.2", "data.train='a=b'"]
    assert sys.argv[1:] == ["-m", "--config-dir", "mine", *args.overrides]  # as Hydra 1.3 wants to read them


def test_names_that_other_tools_have_lead_to_a_key_that_is_there():
    known = [*known_keys(), "hydra.run.dir", "model.lora.r", "model.lora.target_modules"]
    for key in MEANT:
        said = unknown_key(key, known, [f"{key}=7"])
        named = re.search(r"did you mean (?:\S+ )?(\S+)=7\?|: use (.*)|(belongs to)", said)
        assert named and (named[1] is None or named[1] in known), said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method=KTO", "did you mean kto?"),
        ("model=Qwen", "did you mean qwen1.5-1.8b-sft or qwen2.5-0.5b or"),
        ("model=my/model", "of your own: model=local model.path=my/model"),
        ("data=pairs.jsonl", "of your own: data=jsonl data.train=pairs.jsonl"),
        ("model.tuning=QLoRA", "did you mean qlora?"),
        ("wandb=none", "did you mean tracking=none?"),
        ("dataset=p.jsonl", "did you mean data=jsonl data.train=p.jsonl?"),
        ("beta=0.1,0.2", "add -m for a run of each (--multirun)"),
        ("data.train=a.jsonl,b.jsonl", "the list data.train=[a.jsonl,b.jsonl] or the one text data.train='a.jsonl,b.j"),
    ],
)
def test_other_spellings_and_things_of_one_s_own_are_answered_with_what_to_type(word, said):
    with pytest.raises(ConfigError) as refusal:
        compose([word])
    assert said in str(refusal.value)


def test_a_sweep_after_a_run_of_several_processes_starts_each_job_as_that_was():
    typed = "torchrun --nproc_per_node 2 -m dpo_kit method=ipo beta=0.1"
    assert again(typed, "ipo", beta="0.2") == "torchrun --nproc_per_node 2 -m dpo_kit method=ipo beta=0.2"
    sweep = shlex.split(again(typed, "ipo", "-m", beta="0.1,0.2"))
    assert sweep[:4] == ["python", "-m", "dpo_kit", "-m"]
    launcher = compose_unchecked([word for word in sweep[4:] if "beta" not in word], with_hydra=True).hydra.launcher
    assert list(launcher.command) == ["torchrun", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        ("python3 /env/bin/torchrun --nproc_per_node 2 -m dpo_kit beta=1", "torchrun --nproc_per_node 2"),
        (
            "/env/python -m torch.distributed.run --nnodes 1 -m dpo_kit beta=1",
            "python -m torch.distributed.run --nnodes 1",
        ),
        (
            "/usr/bin/python /env/bin/accelerate launch --config_file a.yaml -m dpo_kit",
            "accelerate launch --config_file a.yaml",
        ),
        ("timeout 9 python -m dpo_kit beta=1", ""),
        ("bash", ""),
    ],
)
def test_what_started_several_processes_is_named_as_it_was_typed(parent, words, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: parent.replace(" ", "\0"))
    assert " ".join(launcher()) == words
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert " ".join(launcher()) == words or (not words and launcher() == ["torchrun", "--nproc_per_node", "2"])


def test_the_way_to_go_on_is_quoted_for_shell_and_hydra(tmp_path):
    run = RunDirectory(tmp_path / "it's beta=0.1 [x]")
    (word,) = shlex.split(how_to_go_on(run, "torchrun -m dpo_kit seed=1"))[4:]
    assert OverridesParser.create().parse_override(word).value() == str(run.root)


def test_after_a_sweep_its_axes_and_launcher_are_kept_and_its_folder_is_not():
    typed = "python -m dpo_kit -m data=jsonl method=a,b seed=0,1 hydra/launcher=slurm hydra.launcher.jobs=2"
    typed += " hydra.sweep.dir=s ++hydra.job.env_set.WANDB_RUN_GROUP=s trl.max_steps=2"
    kept = "data=jsonl method=a,b seed=0,1 hydra/launcher=slurm hydra.launcher.jobs=2 trl.max_steps=4"
    assert again(typed, None, "-m", **{"trl.max_steps": "4"}) == f"python -m dpo_kit -m {kept}"
    assert again("python -m dpo_kit beta-sweep=wide seed=1", None, beta="1") == "python -m dpo_kit seed=1 beta=1"


def test_a_tool_s_next_command_trains_the_model_that_it_was_about():
    words = [
        "mode=build",
        "model=local",
        "model.path=my model",
        "judge=llm",
        "data.gold=g",
        "data.eval=e",
        "out=o",
    ]
    assert training(words, "o/p.jsonl") == (
        "python -m dpo_kit model=local 'model.path=my model' data.gold=g data.eval=e data=jsonl data.train=o/p.jsonl"
    )
    assert "data.eval" not in training([*words, "data.columns={a: b}"], "o/p.jsonl")
    assert training(["mode=check", "data=jsonl", "data.train=a b"]) == "python -m dpo_kit data=jsonl 'data.train=a b'"


def test_where_nothing_was_learned_more_training_is_named_and_no_sweep():
    settings = check(compose(["method=kto"]))
    flat = [{"step": step, "loss": 0.5, "probe/auc": 0.5, "probe/auc_low": 0.4} for step in range(1, 20)]
    assert loss_flat(flat, settings.method.model_dump())
    said = next_command(settings, "python -m dpo_kit method=kto", flat)
    assert said == "python -m dpo_kit method=kto trl.num_train_epochs=2"
