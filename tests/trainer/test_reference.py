"""The reference store: one pass for every run that needs it, equal to TRL's own, never stale, never damaged."""

import importlib
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dpo_kit.config.compose import check, compose
from dpo_kit.errors import ModelError
from dpo_kit.trainer import reference_store as reference
from dpo_kit.trainer.reference_store import Store, StoredReference, reference_key
from tests import tiny
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def stored(folder, tmp_path):
    """Build a trainer whose reference pass goes through a store of this test's own."""

    def build(kind="dpo", **options):
        store = {"mixins": [StoredReference], "root": tmp_path / "store"}
        return tiny.trainer(kind, folder, tmp_path / "out", **store, precompute_ref_log_probs=True, **options)

    return build


@pytest.fixture
def computed(monkeypatch):
    """The sequences that were scored to be stored, and those that were scored again as a check."""
    seen = {"computed": [], "checked": []}
    honest = reference.score_as_trained

    def counting(trainer, model, sequences, description=None):
        seen["computed" if description else "checked"] += [str(each) for each in sequences]
        return honest(trainer, model, sequences, description)

    monkeypatch.setattr(reference, "score_as_trained", counting)
    return seen


def columns(trainer):
    names = [name for name in trainer.train_dataset.column_names if name.startswith("ref_")]
    return {name: trainer.train_dataset[name][:] for name in names}


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_trl_does_not_hash_the_weights_for_a_cache_that_the_store_replaces(stored, kind, monkeypatch):
    home = importlib.import_module(f"trl.trainer.{kind}_trainer")
    monkeypatch.setattr(home, "hash_module", refuse := lambda module: pytest.fail("hashed"))
    stored(kind)
    assert home.hash_module is refuse  # others find it as it was


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {}),
        ("dpo", {"max_length": 6}),
        ("dpo", {"max_length": 6, "truncation_mode": "keep_end"}),
        ("dpo", {"ld_alpha": 0.3}),
        ("dpo", {"ld_alpha": 0.3, "max_length": 7}),
        ("dpo", {"peft_config": tiny.LORA}),
        ("kto", {}),
        ("kto", {"max_length": 6}),
        ("kto", {"loss_type": "apo_zero_unpaired"}),
    ],
)
def test_stored_values_equal_those_of_trl_on_random_rows(kind, options, stored, folder, tmp_path):
    seed = random.randrange(10**6)
    rows = (tiny.unary if kind == "kto" else tiny.pairs)(24, seed=seed)
    ours = columns(stored(kind, rows=rows, **options))
    again = columns(stored(kind, rows=rows, **options))  # from the store
    theirs = columns(tiny.trainer(kind, folder, tmp_path, rows=rows, precompute_ref_log_probs=True, **options))
    assert ours == again and set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5, abs=1e-4), (name, seed)


def test_four_betas_and_losses_compute_each_sequence_once(stored, computed):
    for beta, loss in ((0.05, "sigmoid"), (0.1, "sigmoid"), (0.2, "ipo"), (0.5, "hinge")):
        stored(beta=beta, loss_type=[loss], learning_rate=beta, seed=int(100 * beta))
    assert len(computed["computed"]) == len(set(computed["computed"])) == len({str(x) for x in computed["computed"]})
    once = len(computed["computed"])
    assert once > 16 and len(computed["checked"]) <= 4 * 2 * reference.RECHECKED  # train and eval of each run


def test_stock_trl_computes_the_reference_anew_for_every_beta(folder, tmp_path, monkeypatch):
    """The fault that the store is for: huggingface/trl#3985. When this fails, TRL has mended it."""
    from trl import DPOTrainer

    passes = []
    honest = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer, "compute_ref_log_probs", lambda self, *a: (passes.append(self.beta), honest(self, *a))[1]
    )
    for beta in (0.05, 0.1, 0.2, 0.5):
        tiny.trainer("dpo", folder, tmp_path, precompute_ref_log_probs=True, beta=beta)
    assert passes.count(0.05) == passes.count(0.1) == passes.count(0.2) == passes.count(0.5) > 0


def test_kto_takes_the_answers_of_dpo_s_pass(stored, computed):
    pairs = tiny.pairs(8)
    stored(rows=pairs)
    known = set(computed["computed"])
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    trainer = stored("kto", rows=rows, loss_type="apo_zero_unpaired")
    assert len(columns(trainer)["ref_logps"]) == 16 and set(computed["computed"]) == known


def test_full_and_lora_tuning_share_the_base_s_pass(stored, computed):
    stored()
    known = len(computed["computed"])
    stored(peft_config=tiny.LORA)
    stored(peft_config=tiny.LORA, seed=7)
    assert len(computed["computed"]) == known


def test_every_part_of_the_reference_s_address_counts(stored):
    trainer = stored()
    model = trainer.model
    keys = [reference_key(trainer, model)]
    model.lm_head.weight.data[0, 0] += 1e-6
    keys.append(reference_key(trainer, model))
    model.config.rms_norm_eps *= 2
    keys.append(reference_key(trainer, model))
    keys.append(reference_key(trainer, model.to(torch.bfloat16)))
    trainer.accelerator.state._mixed_precision = "bf16"
    try:
        keys.append(reference_key(trainer, model))
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    assert len(set(keys)) == len(keys)


def test_the_address_of_a_sequence_is_its_tokens_and_where_the_answer_begins():
    addresses = {
        reference._address(tokens) for tokens in [([1, 2], [3]), ([1], [2, 3]), ([1, 2], [4]), ([], [1, 2, 3])]
    }
    assert len(addresses) == 4


@pytest.mark.fault("a damaged file of stored reference values", promise="P8")
def test_a_damaged_file_is_set_aside_and_computed_again(stored, computed, tmp_path, caplog):
    first = columns(stored())
    known = len(computed["computed"])
    for file in (tmp_path / "store").rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    assert columns(stored()) == first
    assert len(computed["computed"]) == 2 * known and "set aside" in caplog.text
    assert list((tmp_path / "store").rglob("*.damaged"))


@pytest.mark.fault("stored values that belong to another model", promise="P8")
def test_values_of_another_model_are_found_out_by_the_sample(stored, computed, tmp_path):
    first = columns(stored())
    (file,) = (tmp_path / "store").rglob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    Store(file.parent).write([bytes(each) for each in tensors["addresses"].numpy()], tensors["logps"] + 0.5, 1.0)
    assert columns(stored()) == first


@pytest.mark.fault("a reference of weights that are not finite", promise="P7")
def test_a_reference_that_is_not_finite_is_refused_and_nothing_is_stored(folder, stored, tmp_path):
    broken = LlamaForCausalLM.from_pretrained(folder)
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        stored(model=broken)
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_a_killed_pass_keeps_the_parts_that_it_finished(stored, computed, monkeypatch):
    monkeypatch.setattr(reference, "AT_ONCE", 8)
    counting = reference.score_as_trained

    def killed(trainer, model, sequences, description=None):
        if len(computed["computed"]) >= 16:
            raise KeyboardInterrupt
        return counting(trainer, model, sequences, description)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "score_as_trained", killed)
        stored()
    assert len(computed["computed"]) == 16
    stored()
    assert len(computed["computed"]) == len(set(computed["computed"])) > 16


WORKER = """
import sys
from pathlib import Path
from dpo_kit.trainer import reference_store as reference
from tests import tiny
folder, root, out = sys.argv[1:]
store = {"mixins": [reference.StoredReference], "root": Path(root)}
tiny.trainer("dpo", folder, Path(out), **store, precompute_ref_log_probs=True)
"""


@pytest.mark.slow
def test_of_two_processes_one_computes_and_the_other_reads(folder, tmp_path):
    start = [sys.executable, "-c", WORKER, folder, str(tmp_path / "store")]
    both = [subprocess.Popen([*start, str(tmp_path / name)], cwd=ROOT) for name in ("a", "b")]
    assert [process.wait(200) for process in both] == [0, 0]
    stored = [
        bytes(address)
        for file in (tmp_path / "store").rglob("*.safetensors")
        for address in load_file(file)["addresses"].numpy()
    ]
    assert len(stored) == len(set(stored)) > 16


@pytest.mark.parametrize(
    ("overrides", "used"),
    [
        ([], True),
        (["trl.max_steps=10"], False),
        (["trl.max_steps=10", "speed.reference_store=true"], True),
        (["speed.reference_store=false"], False),
        (["method=orpo", "speed.reference_store=true"], False),
        (["trl.sync_ref_model=true", "speed.reference_store=true"], False),
    ],
)
def test_the_store_is_used_where_a_run_sees_every_row(overrides, used):
    from dpo_kit.trainer.arguments import uses_store

    assert uses_store(check(compose(overrides)), [{}] * 1000) is used
