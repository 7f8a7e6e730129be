"""Step 0: in every trainer and tuning the loss reads the policy's own start as the reference, or it is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from dpo_kit.callbacks.reference import Reference
from dpo_kit.config.compose import check, compose
from dpo_kit.errors import ModelError
from dpo_kit.model.load import load_tokenizer
from dpo_kit.run.directory import RunDirectory
from dpo_kit.toy import TRAIN
from dpo_kit.trainer import reference_store as reference
from dpo_kit.trainer.build import build_trainer
from dpo_kit.trainer.measuring import StartCheck
from dpo_kit.trainer.reference_store import StoredReference
from dpo_kit.trainer.rows import prepare_data
from dpo_kit.training import train
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def checked(trainer, **options):
    """Train `trainer` with the check alone; the steps that it took."""
    trainer.add_callback(StartCheck(trainer, Reference(trainer, **options)))
    try:
        trainer.train()
    finally:
        trainer.steps = trainer.state.global_step
    return trainer.steps


def stored(kind, folder, tmp_path, **options):
    store = {"mixins": [StoredReference], "root": tmp_path / "store"}
    return tiny.trainer(kind, folder, tmp_path / "out", **store, precompute_ref_log_probs=True, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {}),
        ("dpo", {"ld_alpha": 0.4}),
        ("dpo", {"max_length": 6}),
        ("dpo", {"peft_config": tiny.LORA}),
        ("dpo", {"sync_ref_model": True}),
        ("dpo", {"bf16": True}),
        ("kto", {}),
        ("kto", {"peft_config": tiny.LORA}),
        ("orpo", {}),
        ("simpo", {"peft_config": tiny.LORA}),
    ],
)
def test_an_honest_start_passes(kind, options, folder, tmp_path):
    assert checked(tiny.trainer(kind, folder, tmp_path, max_steps=1, eval_strategy="no", **options)) == 1


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.4}, {"peft_config": tiny.LORA}, {"max_length": 6}])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_honest_store_passes(kind, options, folder, tmp_path):
    if kind == "kto" and "ld_alpha" in options:
        pytest.skip("KTO has no ld_alpha")
    assert checked(stored(kind, folder, tmp_path, max_steps=1, eval_strategy="no", **options)) == 1


@pytest.mark.fault("an edited policy beside a reference from its path", promise="P7")
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_policy_edited_in_memory_is_found_out_before_step_1(kind, folder, tmp_path):
    """TRL reloads the reference from config._name_or_path without a word; when this fails, TRL has mended it."""
    policy = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    trainer = tiny.trainer(kind, folder, tmp_path, model=policy)
    with pytest.raises(ModelError, match=r"policy edited, merged or resized in memory.*pass ref_model"):
        checked(trainer)
    assert trainer.steps == 0


@pytest.mark.fault("an adapter that does not start at zero", promise="P7")
@pytest.mark.parametrize("precomputed", [False, True])
def test_an_adapter_that_does_not_start_at_zero_is_found_out(precomputed, folder, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    build = stored if precomputed else tiny.trainer
    with pytest.raises(ModelError, match="an adapter that does not start at zero"):
        checked(build("dpo", folder, tmp_path, peft_config=lora))


@pytest.mark.fault("stored values of another reference", promise="P8")
@pytest.mark.parametrize(("kind", "options"), [("dpo", {}), ("dpo", {"ld_alpha": 0.4}), ("kto", {})])
def test_stored_values_that_are_off_are_found_out_before_step_1(kind, options, folder, tmp_path, monkeypatch):
    honest = reference.reference_logps

    def poisoned(*args):
        logps, place = honest(*args)
        return [value + 0.01 for value in logps], place

    monkeypatch.setattr(reference, "reference_logps", poisoned)
    trainer = stored(kind, folder, tmp_path, **options)
    with pytest.raises(ModelError, match=r"differ by up to 0\.01"):
        checked(trainer)
    assert trainer.steps == 0


def test_one_row_of_sixteen_whose_stored_value_is_off_is_found_out(folder, tmp_path, monkeypatch):
    honest = reference.reference_logps

    def poisoned(*args):
        logps, place = honest(*args)
        return [value + 0.01 * (index == 5) for index, value in enumerate(logps)], place

    monkeypatch.setattr(reference, "reference_logps", poisoned)
    with pytest.raises(ModelError, match=r"differ by up to 0\.01"):
        checked(stored("dpo", folder, tmp_path))


def test_another_reference_that_is_meant_is_reported_not_refused(folder, tmp_path, caplog):
    caplog.set_level("INFO", "dpo_kit")
    other = tiny.model(seed=5)
    trainer = tiny.trainer("dpo", folder, tmp_path, ref_model=other, max_steps=1, eval_strategy="no")
    assert checked(trainer, is_start=False) == 1
    assert "at step 0 it differs by up to" in caplog.text


def test_a_resumed_run_is_not_held_to_its_start(folder, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    tiny.trainer("dpo", folder, tmp_path, **saved).train()
    trainer = tiny.trainer("dpo", folder, tmp_path, **saved, max_steps=6)
    trainer.add_callback(StartCheck(trainer, Reference(trainer)))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


# --- in whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:20]))
    small = ["tracking=none", "callbacks=none", "trl.max_steps=1", "trl.per_device_train_batch_size=4"]
    return [*small, f"data.train={tmp_path / 'pairs.jsonl'}", "data.eval=null", "data.holdout=0.4", "data.gold=null"]


@pytest.mark.fault("a run whose adapter does not start at zero", promise="P7")
def test_a_run_is_checked_where_no_callback_measures(few, tmp_path):
    run = [*few, "model.tuning=lora", "+model.lora.init_lora_weights=false"]
    with pytest.raises(ModelError, match="at step 0"):
        train(compose(run), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.fault("a policy whose config names another path", promise="P7")
@pytest.mark.parametrize("store", [True, False])
def test_a_model_that_names_another_path_as_its_own_has_itself_as_reference(few, tmp_path, store):
    mine, theirs = Path(tiny.saved_model(tmp_path / "mine")), tiny.saved_model(tmp_path / "theirs", seed=4)
    config = json.loads((mine / "config.json").read_text()) | {"_name_or_path": theirs}
    (mine / "config.json").write_text(json.dumps(config))
    own = ["model=local", f"model.path={mine}", "allow_learning_rate=true", f"speed.reference_store={store}"]
    settings = check(compose([*few, *own, "trl.max_length=32", "data.wrap_as_chat=false"]))
    tokenizer, run = load_tokenizer(settings.model), RunDirectory(tmp_path / "run")
    trainer = build_trainer(settings, prepare_data(settings, tokenizer), tokenizer, run)
    trainer.model.config._name_or_path = theirs
    if not store:
        assert torch.equal(trainer.ref_model.lm_head.weight, trainer.model.lm_head.weight)
    assert checked(trainer) == 1


@pytest.mark.fault("a run that starts inside another run", promise="P7")
def test_a_run_that_goes_on_from_a_finished_one_records_its_parent(few, tmp_path):
    train(compose([*few, "beta=0.2", "trl.learning_rate=1e-3"]), tmp_path / "first")
    assert not (tmp_path / "first" / "model" / "training_args.bin").exists()
    train(compose([*few, f"model.path={tmp_path / 'first' / 'model'}"]), tmp_path / "second")
    parent = json.loads((tmp_path / "second" / "manifest.json").read_text())["model"]["parent"]
    assert parent["run"] == str(tmp_path / "first") and (parent["method"], parent["beta"]) == ("dpo", 0.2)
