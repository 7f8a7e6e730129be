"""Odd values for the keys of every tool, drawn anew each day: a refusal that names the key, or none; never a traceback.

DPO_KIT_ODD_SEED=N draws what a failure names again.
"""

import datetime
import os
import random
import sys

import pytest
from omegaconf import OmegaConf

from dpo_kit.cli import dashboard, env
from dpo_kit.cli import main as cli
from dpo_kit.cli import plan as planning
from dpo_kit.config.building import Build
from dpo_kit.config.compose import check, compose
from dpo_kit.config.explain import known_keys
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.data import __main__ as preparing
from dpo_kit.data.build import pairs
from dpo_kit.data.curate import modes
from dpo_kit.data.options import Convert, Curate
from dpo_kit.errors import DpoKitError
from dpo_kit.evaluate import __main__ as evaluation
from dpo_kit.evaluate.options import Alpaca, Domain, Evaluate, Harness, MTBench, WinRate
from dpo_kit.export import __main__ as exporting
from dpo_kit.run.directory import RunDirectory
from dpo_kit.sweep import __main__ as summing_up
from dpo_kit.toy import MODEL
from dpo_kit.training import train
from tests.small import few_pairs

SEED = int(os.environ.get("DPO_KIT_ODD_SEED", datetime.date.today().toordinal()))
VALUES = [
    "1e309", "", " ", "null", "~", "-1", "0", "1", "-0.5", "0.5", "2.5", "nan", "inf", "-inf", "true", "no", "[]", "{}",
    "[1,2]", "[a,b]", "[[1],[2]]", "[null]", "{a: b}", "{1: 2}", "{a: {b: c}}", "1,2", "a,b", "'", '"', "[", "{", "}",
    "${x}", "${", "${oc.env:NO_SUCH_VARIABLE}", "${.seed}", "..", "/no/such/place", "./nothing.jsonl", "~/nothing",
    "数据", "a b", " x", "a=b", "=", "-", "--x", "+1", "0x10", "1_000", "9" * 30, "x" * 300,
    "???", "$(ls)", ";", "%s", "@",
    "a:b", "range(1,3)", "choice(1,2)", "glob(*)", "float(nan)", "sort(1)", "\\", "a\\", "\u202e",
    "é", "NaN", "None", "True", "1e-5", "1.5e",
    "localhost:8000", "http://", "https://[", "org/name", "org/name/more", "a.b.c", "json.loads",
    "~nobody_here/x.jsonl", "x/" * 2500 + "y.jsonl", "/dev/null", "/", "a\nb",
]  # fmt: skip


def leaves(model, prefix):
    return [f"{prefix}.{field.alias or name}" for name, field in model.model_fields.items()]


def fields(name):
    return [f"model.{name}.{key}" for key in load_schema()[name]]


IN_CONFIG = [*known_keys(), *fields("lora"), *fields("quantization")]
TRAINING = [*IN_CONFIG, "hydra.run.dir", "hydra.sweep.dir"]
DATA = [*leaves(Curate, "curate"), *leaves(Convert, "convert"), *leaves(Build, "build"), "mode", "out"]
EVALUATION = [*Evaluate.model_fields, *leaves(WinRate, "win_rate")]
PARTS = {"gate": Harness, "alpaca_eval": Alpaca, "mt_bench": MTBench, "domain": Domain}
for part, model in PARTS.items():
    EVALUATION += leaves(model, part)


TOOLS = {  # the keys that are drawn from, the words before them, what the command does
    "train": (TRAINING, [], lambda words: cli._work(cli.read_arguments(words))),
    "sweep of": (TRAINING, ["-m", "seed=0,1"], lambda words: cli._work(cli.read_arguments(words))),
    "plan": (TRAINING, [], planning.plan),
    "data": ([*DATA, *TRAINING], [], preparing.work),
    "curate": (leaves(Curate, "curate"), ["mode=curate"], preparing.work),
    "convert": (leaves(Convert, "convert"), ["mode=convert"], preparing.work),
    "build": ([*DATA, *TRAINING], ["mode=build"], preparing.work),
    "evaluate": ([*EVALUATION, *TRAINING], [f"policy={MODEL}", f"reference={MODEL}"], evaluation.work),
    "export": (["run", "out", "push", *exporting.CHOICES], ["run=r"], exporting.export),
    "sweep": (list(summing_up.KEYS), ["sweep=s"], summing_up.summarise),
    "dashboard": (list(dashboard.KEYS), ["project=p"], dashboard.print_address),
    "env": (["out"], [], env.report),
}
AT_WORK = (  # what a command does once nothing is refused
    (cli, "_single"), (cli, "_sweep"), (planning, "dry_run"), (planning, "plan_run"), (pairs, "build_pairs"),
    (evaluation, "evaluate"), (RunDirectory, "read_finished"), (summing_up, "show_summary"),
    (summing_up, "measure_recommended"), (dashboard, "missing_package"), (env, "describe"),
)  # fmt: skip


class TakenError(Exception):
    """Nothing was refused."""


def draw(chance, tool):
    """A command of `tool` with one odd value, at times two, or a key that is not quite one."""
    keys, first, _ = TOOLS[tool]
    words = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        key = chance.choice(keys)
        if chance.random() < 0.1:
            key = key[:-1] or key
        words.append(chance.choice(("", "", "", "+", "++", "~", "--")) + f"{key}={chance.choice(VALUES)}")
    return [*first, *words]


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo_kit"])
    monkeypatch.setattr(cli, "claim", lambda folder: folder)

    def taken(*args, **options):
        raise TakenError

    for place, name in AT_WORK:
        monkeypatch.setattr(place, name, taken)
    for mode in modes.MODES:
        monkeypatch.setitem(modes.MODES, mode, taken)
    return tmp_path


def try_one(words, act):
    """The refusal of a command, None where it is taken; any other error fails, as one does that names no key."""
    try:
        act(list(words))
    except DpoKitError as refusal:
        parts = {part for word in words for part in word.lstrip("+~-").partition("=")[0].split(".") if part}
        named = any(part in str(refusal) for part in (*parts, "overrides are", "arguments are"))
        assert named, f"seed {SEED}: {words}: {refusal}"
        return refusal
    except TakenError:
        return None
    except Exception as error:
        raise AssertionError(f"seed {SEED}: {words} ends in {type(error).__name__}: {error}") from error
    return None


@pytest.mark.parametrize("tool", TOOLS)
def test_a_command_with_an_odd_value_is_taken_or_refused_by_its_key(tool, nowhere):
    chance = random.Random(f"{SEED} {tool}")
    for _ in range(3):
        try_one(draw(chance, tool), TOOLS[tool][2])
    assert list(nowhere.iterdir()) == []


def test_every_key_of_training_takes_or_refuses_odd_values_in_the_config_itself():
    """As from a YAML file: no command line between. Some hundred of them, since only checking takes milliseconds."""
    chance, base = random.Random(SEED), compose(["model.tuning=lora"])
    OmegaConf.set_struct(base, False)
    kinds = (
        None,
        -1,
        0,
        0.5,
        2.5,
        float("nan"),
        float("inf"),
        10**30,
        True,
        "",
        "x",
        "no",
        [],
        [1],
        [None],
        {},
        {"a": 1},
    )
    for _ in range(30):
        key, value, cfg = chance.choice(IN_CONFIG), chance.choice(kinds), base.copy()
        OmegaConf.update(cfg, key, value, merge=False)
        try_one([f"{key}={value}"], lambda _, cfg=cfg: check(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_a_thousand_commands_with_odd_values_leave_no_traceback(tool, nowhere):
    chance = random.Random(f"{SEED} {tool} more")
    for _ in range(1 + 1000 // len(TOOLS)):
        try_one(draw(chance, tool), TOOLS[tool][2])
    assert list(nowhere.iterdir()) == []


@pytest.mark.slow
def test_odd_values_that_pass_the_check_train_or_end_in_one_sentence(nowhere):
    """What only TRL, transformers or peft can judge: their errors come as ours, with the keys."""
    chance, tried = random.Random(f"{SEED} trains"), 0
    keys = [
        key for key in TRAINING if key.startswith(("trl.", "model.lora.", "callbacks.", "speed.")) and "push" not in key
    ]
    base = [*few_pairs(nowhere / "pairs.jsonl"), "trl.max_steps=1", "callbacks.prompts=2", "model.tuning=lora"]
    while tried < 12:
        word = f"{'++' if tried % 2 else ''}{chance.choice(keys)}={chance.choice(VALUES)}"
        try:
            cfg = compose([*base, word])
        except DpoKitError:
            continue
        tried += 1
        try_one([word, "this config"], lambda _, cfg=cfg, run=f"run{tried}": train(cfg, nowhere / run))
