"""LoRA in PEFT's own variants, for methods with a reference and without; choices that cost or mislead are said."""

import math

import pytest

from dpo_kit import ConfigError, compose, train
from dpo_kit.export.folder import Export, export_run
from dpo_kit.history import read_metrics
from dpo_kit.run import RunDirectory, read_json
from dpo_kit.toy import MODEL
from tests.small import few_pairs

QUICK = ["callbacks=none", "trl.save_strategy=no", "trl.logging_steps=1", "trl.learning_rate=1e-3"]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo"])
@pytest.mark.parametrize("variant", ["use_rslora", "use_dora", "target_modules"])
def test_a_variant_of_lora_trains_every_kind_of_method_and_is_merged(variant, method, tuning, tmp_path):
    value = "[q_proj,v_proj]" if variant == "target_modules" else "true"
    words = [*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, f"method={method}", f"model.tuning={tuning}"]
    train(compose([*words, f"model.lora.{variant}={value}"]), tmp_path / "run")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(set(losses)) > 1 and all(map(math.isfinite, losses))
    adapter = read_json(tmp_path / "run" / "model" / "adapter_config.json")
    assert adapter[variant] == (True if value == "true" else adapter[variant])
    assert variant != "target_modules" or set(adapter[variant]) == {"q_proj", "v_proj"}
    base = "dequantised" if tuning == "qlora" else "original"
    assert export_run(Export(RunDirectory(tmp_path / "run"), tmp_path / "export", base=base))["greedy"] == 1


def test_a_full_reference_that_the_adapter_has_already_is_refused():
    with pytest.raises(ConfigError, match=r"is the start itself, which model.tuning=lora has already"):
        compose(["model.tuning=lora", f"model.reference={MODEL}"])
    compose([f"model.reference={MODEL}"])


def test_an_adapter_on_one_of_two_tied_embeddings_is_said(tmp_path, caplog):
    words = [*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, "method=orpo", "model.tuning=lora", "trl.max_steps=1"]
    train(compose([*words, "model.lora.modules_to_save=[embed_tokens]"]), tmp_path / "run")
    assert "puts an adapter on embed_tokens, one of two embeddings that this model ties" in caplog.text
    caplog.clear()
    train(compose([*words, "model.lora.target_modules=[q_proj]"]), tmp_path / "other")
    assert "ties" not in caplog.text
