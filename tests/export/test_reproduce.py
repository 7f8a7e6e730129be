"""The script that an export writes repeats the run in plain TRL; TRL's own world is reached by YAML alone."""

import inspect
import json
import runpy
import subprocess
import sys
import textwrap

import pytest
from hydra.utils import get_class
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from dpo_kit import ConfigError, DataError, compose, train
from dpo_kit.config import trl_schema
from dpo_kit.config.compose import check
from dpo_kit.export.__main__ import main
from dpo_kit.export.script import write_reproduction
from dpo_kit.model.scoring import uses_fused_head
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.history import read_metrics
from dpo_kit.trainer.arguments import build_arguments, describe_arguments
from tests.small import few_pairs
from tests.trainer.test_families import saved, words

QUICK = ["callbacks=none", "trl.save_strategy=no", "trl.logging_steps=1"]
MINE = """\
# @package _global_
defaults: [dpo, _self_]
method: {{name: mine}}
trl: {{loss_type: [{loss}]}}
"""


def _losses(rows):
    return [row[key] for row in rows for key in ("loss", "eval_loss") if key in row]


APART = """
import json, runpy, sys
history = runpy.run_path(sys.argv[1])["trainer"].state.log_history
assert not [name for name in sys.modules if name.startswith("dpo_kit")]
print("\\n" + json.dumps(history))
"""


def _repeat(run):
    """The losses of the script for `run`, run as it stands in a process that does not know dpo_kit."""
    script = write_reproduction(RunDirectory(run), run / "reproduce")
    words = [sys.executable, "-c", APART, str(script)]
    done = subprocess.run(words, cwd=run, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (script.parent / "model").iterdir()} & {"config.json", "adapter_config.json"}
    return _losses(json.loads(done.stdout.splitlines()[-1]))


def _repeat_here(run):
    """The same in this process."""
    return _losses(
        runpy.run_path(str(write_reproduction(RunDirectory(run), run / "reproduce")))["trainer"].state.log_history
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["method=dpo"],
        ["method=kto"],
        ["method=orpo", "trl.gradient_accumulation_steps=2"],
        ["method=simpo"],
        ["method=dpo", "model.tuning=lora"],
        ["method=dpo", "model.tuning=qlora", "speed.share_prefix=false"],
        ["method=ipo", "speed.reference_store=true", "seed=3"],
    ],
    ids=" ".join,
)
def test_the_script_reaches_the_losses_of_the_run_without_dpo_kit(words, tmp_path):
    run = tmp_path / "run"
    train(compose([*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, *words, "trl.learning_rate=1e-3"]), run)
    ours = _losses(read_metrics(run / "metrics.jsonl"))
    assert len(ours) >= 4 and ours[0] != ours[-1]
    assert _repeat(run) == pytest.approx(ours, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tuning", "own"),
    [
        ("mamba", "lora", {}),  # modules that the adapter must leave out
        ("jamba", "qlora", {}),  # and 4 bit
        ("granitemoe", "full", {}),  # a number of experts under another name
        ("opt", "full", {"dropout": 0.3, "word_embed_proj_dim": 32}),  # dropout that TRL does not reach
    ],
)
def test_the_script_has_what_the_family_needs(family, tuning, own, tmp_path):
    run, folder = tmp_path / "run", saved(tmp_path / "model", family, **own)
    more = [*QUICK, f"model.tuning={tuning}", "trl.learning_rate=1e-3", "speed.share_prefix=false"]
    train(compose(words(folder, tmp_path, *more)), run)
    ours = _losses(read_metrics(run / "metrics.jsonl"))
    assert ours[0] != ours[-1] and _repeat(run) == pytest.approx(ours, rel=1e-5)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    train(compose([*few_pairs(root / "pairs.jsonl"), *QUICK, "trl.pad_token='<|end|>'"]), root / "run")
    return root / "run"


def test_the_arguments_of_a_run_can_be_given_back_to_trl_as_they_are(finished_run):
    written = read_json(finished_run / "trl_config.json")
    assert written["hub_token"] is None and written["pad_token"] == "<|end|>"
    cfg = check(compose(QUICK))
    again = get_class(cfg.method.config)(**written)
    assert sorted(describe_arguments(again).items(), key=str) == sorted(written.items(), key=str)


def test_a_token_of_the_hub_is_in_no_run_directory(tmp_path):
    settings = check(compose(QUICK))
    args = build_arguments(settings, [{}] * 64, tmp_path, 96)
    args.hub_token = "hf_" + "abcdefgh" * 5
    assert describe_arguments(args)["hub_token"] == "<redacted>"


def test_a_script_is_complete_or_absent_and_does_not_overwrite(finished_run, tmp_path, monkeypatch):
    run, out = RunDirectory(finished_run), tmp_path / "out"

    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr("dpo_kit.export.script.build_script", fail)
        write_reproduction(run, out)
    assert list(tmp_path.iterdir()) == []
    assert write_reproduction(run, out) == out / "reproduce.py"
    assert {path.name for path in out.iterdir()} == {"reproduce.py", "trl_config.json", "train", "eval"}
    with pytest.raises(ConfigError, match="is there already"):
        write_reproduction(run, out)


def test_rows_that_have_changed_since_the_run_are_refused(finished_run, tmp_path, capsys):
    pairs = finished_run.parent / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text("".join(text.splitlines(keepends=True)[:-1]))
    try:
        with pytest.raises(DataError, match=r"gives other .* rows now than the run was made of"):
            write_reproduction(RunDirectory(finished_run), tmp_path / "out")
        assert main([f"run={finished_run}", "mode=script", f"out={tmp_path / 'out'}"]) == 2
    finally:
        pairs.write_text(text)
    assert "bring its files back" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_dropout_that_the_script_cannot_repeat_is_said(tmp_path, caplog):
    run = tmp_path / "run"
    few = [*few_pairs(tmp_path / "pairs.jsonl"), "callbacks=none", "trl.save_strategy=no", "trl.max_steps=1"]
    train(compose([*few, "model.tuning=lora", "model.lora.lora_dropout=0.05", "trl.disable_dropout=false"]), run)
    script = write_reproduction(RunDirectory(run), run / "reproduce")
    assert "LoRA's dropout" in caplog.text
    assert "lora_dropout=0.05" in script.read_text() and "target_modules='all-linear'" in script.read_text()


def test_a_loss_without_a_method_file_of_ours_trains_from_a_user_s_own(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(MINE.format(loss="nca_pair"))
    words = [*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, "method=mine", "trl.learning_rate=1e-3"]
    result = train(compose(words, config_dir=tmp_path), tmp_path / "run")
    ours = _losses(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert result.method == "mine" and ours[0] == pytest.approx(1.3863, abs=1e-3)  # 2 log 2, where nothing is learnt
    assert _repeat_here(tmp_path / "run") == pytest.approx(ours, rel=1e-5)


class Halved(DPOTrainer):
    """A trainer of a user's own, whose loss is half of DPO's."""

    def _compute_loss(self, *args, **kwargs):
        found = super()._compute_loss(*args, **kwargs)
        return (found[0] / 2, *found[1:]) if isinstance(found, tuple) else found / 2


@pytest.mark.slow
def test_a_trainer_of_a_user_s_own_trains_from_a_method_file_alone(tmp_path):
    (tmp_path / "method").mkdir()
    named = MINE.format(loss="sigmoid").replace("{name: mine}", f"{{name: mine, trainer: {__name__}.Halved}}")
    (tmp_path / "method" / "mine.yaml").write_text(named)
    words = [*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, "trl.learning_rate=1e-3", "trl.max_grad_norm=1e-3"]
    losses = []
    for method in ("mine", "dpo"):
        train(compose([*words, f"method={method}"], config_dir=tmp_path), tmp_path / method)
        losses.append([row["loss"] for row in read_metrics(tmp_path / method / "metrics.jsonl") if "loss" in row])
    assert losses[0] == pytest.approx([loss / 2 for loss in losses[1]], rel=1e-3) and len(losses[0]) == 4
    assert uses_fused_head(Halved)


def test_a_loss_that_trl_will_add_is_known_as_soon_as_that_trl_is_installed(tmp_path, monkeypatch):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(MINE.format(loss="next_year"))
    with pytest.raises(ConfigError, match=r"trl.loss_type must be one of .*got 'next_year'"):
        compose(["method=mine"], config_dir=tmp_path)
    monkeypatch.setattr(trl_schema, "installed_versions", lambda: {"trl": "1.99.0", "transformers": "5.99.0"})
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    trl_schema.load_schema.cache_clear()
    try:
        assert compose(["method=mine"], config_dir=tmp_path).trl.loss_type == ["next_year"]
    finally:
        trl_schema.load_schema.cache_clear()


@pytest.mark.slow
def test_a_loss_that_trl_has_added_trains_from_a_method_file_alone(tmp_path, monkeypatch):
    """TRL's own code with one more name for the sigmoid loss stands for a TRL of next year."""
    source = textwrap.dedent(inspect.getsource(DPOTrainer._compute_loss))
    assert source.count('== "sigmoid"') == 1
    namespace = {}
    exec(source.replace('== "sigmoid"', 'in ("sigmoid", "next_year")'), vars(dpo_trainer), namespace)
    monkeypatch.setattr(DPOTrainer, "_compute_loss", namespace["_compute_loss"])
    monkeypatch.setattr(trl_schema, "installed_versions", lambda: {"trl": "1.99.0", "transformers": "5.99.0"})
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(MINE.format(loss="next_year"))
    words = [*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, "trl.learning_rate=1e-3"]
    losses = []
    trl_schema.load_schema.cache_clear()
    try:
        for method in ("mine", "dpo"):
            train(compose([*words, f"method={method}"], config_dir=tmp_path), tmp_path / method)
            losses.append([row["loss"] for row in read_metrics(tmp_path / method / "metrics.jsonl") if "loss" in row])
    finally:
        trl_schema.load_schema.cache_clear()
    assert losses[0] == losses[1] and len(losses[0]) == 4
