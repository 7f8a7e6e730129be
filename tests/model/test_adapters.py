"""LoRA in PEFT's own variants, for methods with a reference and without; choices that cost or mislead are said."""

import itertools
import json
import math
import runpy
import shutil

import pytest
import torch
from hydra.utils import get_class
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import online_dpo_trainer

from dpo_kit import ConfigError, ModelError, compose, train
from dpo_kit.cli.plan import plan_run
from dpo_kit.config.compose import check
from dpo_kit.export.folder import export_run
from dpo_kit.export.script import write_reproduction
from dpo_kit.model import origin
from dpo_kit.model.adapter import OF_ADAPTER, keep_start, refuse_uncopied
from dpo_kit.model.load import load_policy, load_reference, load_start, load_tokenizer
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.history import read_metrics
from dpo_kit.toy import MODEL
from dpo_kit.trainer.arguments import build_arguments
from dpo_kit.trainer.build import build_trainer
from dpo_kit.trainer.memory import build_weightless
from dpo_kit.trainer.online import JudgedReward
from dpo_kit.trainer.reference_store import _base_weights
from dpo_kit.trainer.rows import read_data
from tests import scored_by_text, tiny
from tests.small import as_texts, differences, few_pairs

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
    assert export_run(RunDirectory(tmp_path / "run"), tmp_path / "export", base=base)["greedy"] == 1


def test_a_full_reference_that_the_adapter_has_already_is_refused():
    with pytest.raises(ConfigError, match=r"is the start itself, which model.tuning=lora has already"):
        compose(["model.tuning=lora", f"model.reference={MODEL}"])
    with pytest.raises(ConfigError, match=r"is the start itself"):
        compose(["model.tuning=lora", f"model.reference={MODEL}/../model/"])
    compose([f"model.reference={MODEL}"])


def test_a_full_reference_of_the_same_weights_beside_an_adapter_is_refused_and_another_one_is_not(tmp_path):
    copy = shutil.copytree(MODEL, tmp_path / "copy")
    words = ["model.tuning=lora", f"model.reference={copy}"]
    with pytest.raises(ConfigError, match=r"has the very weights of model.path=.*save a second model's memory"):
        load_tokenizer(_model(*words))
    other = AutoModelForCausalLM.from_pretrained(MODEL)
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(copy)
    load_tokenizer(_model(*words))
    load_tokenizer(_model(f"model.reference={MODEL}"))  # full tuning: the start, said by its name


def test_an_adapter_on_one_of_two_tied_embeddings_is_said(tmp_path, caplog):
    words = [*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, "method=orpo", "model.tuning=lora", "trl.max_steps=1"]
    train(compose([*words, "model.lora.modules_to_save=[embed_tokens]"]), tmp_path / "run")
    assert "puts an adapter on embed_tokens, one of two embeddings that this model ties" in caplog.text
    caplog.clear()
    train(compose([*words, "model.lora.target_modules=[q_proj]"]), tmp_path / "other")
    assert "ties" not in caplog.text


@pytest.mark.parametrize(
    ("method", "option", "said"),
    [
        (
            "dpo",
            "target_modules=[q_proj,v_prj]",
            r"target_modules: this model has no module v_prj; did you mean v_proj",
        ),
        ("orpo", "target_modules=[attn]", r"target_modules: this model has no module attn.*it has .*q_proj"),
        (
            "kto",
            "modules_to_save=[embed_token]",
            r"modules_to_save: .* no module embed_token; did you mean embed_tokens",
        ),
        ("dpo", "target_modules=[q_proj,lm_head]", r"DPOTrainer works out .* never be trained: take lm_head out"),
        ("kto", "target_modules='.*(q_proj|head)'", r"KTOTrainer works out .*model.lora.modules_to_save=\[lm_head\]"),
    ],
)
def test_an_adapter_that_would_be_left_out_in_silence_is_refused_before_any_weight_is_loaded(method, option, said):
    with pytest.raises(ConfigError, match=said):
        plan_run(check(compose([f"method={method}", "tracking=none", "model.tuning=lora", f"model.lora.{option}"])))


@pytest.mark.slow
@pytest.mark.parametrize("words", [["method=orpo", "model.lora.target_modules=[q_proj,lm_head]"], ["method=dpo"]])
def test_a_head_is_trained_by_methods_that_can_and_as_a_whole_by_all(words, tmp_path):
    tied = "+model.lora.ensure_weight_tying=true"
    words = [*words, *([tied, "model.lora.modules_to_save=[lm_head]"] if len(words) == 1 else [])]
    train(compose([*few_pairs(tmp_path / "pairs.jsonl"), *QUICK, *words, "model.tuning=lora"]), tmp_path / "run")
    start, policy = AutoModelForCausalLM.from_pretrained(MODEL), _adapted(tmp_path / "run" / "model")
    merged = policy.merge_and_unload()
    assert not torch.equal(merged.get_output_embeddings().weight, start.get_output_embeddings().weight)


def test_weights_that_are_published_quantised_are_not_tuned_in_full(tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = read_json(model / "config.json") | {"quantization_config": {"quant_method": "bitsandbytes"}}
    write_json(model / "config.json", config)
    with pytest.raises(ModelError, match=r"published in a quantised form \(bitsandbytes\), .* take model.tuning=lora"):
        plan_run(check(compose(["tracking=none", f"model.path={model}"])))


def test_an_adapter_that_names_no_base_is_refused_by_its_file(tmp_path):
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    cfg = compose(["model=local", f"model.path={tmp_path}", "model.tuning=lora"])
    with pytest.raises(ModelError, match=r"adapter_config\.json has no base_model_name_or_path"):
        origin.find_start(check(cfg).model)


def test_a_tuned_policy_that_is_rounded_to_4_bit_is_told_to_go_on_as_an_adapter(tmp_path, caplog):
    model = shutil.copytree(MODEL, tmp_path / "export")
    write_json(model / "export.json", {})
    for tuning in ("lora", "qlora"):
        wanted = _model(f"model.path={model}", f"model.tuning={tuning}")
        load_policy(wanted, load_tokenizer(wanted))
        assert ("4 bit rounds away part of what tuning changed" in caplog.text) == (tuning == "qlora")


# --- going on with an adapter that is there ------------------------------------------------------------------------


def _model(*words):
    return check(compose(["tracking=none", *words])).model


def _adapted(folder, base=MODEL, **options):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder, **options)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that says something else than its base, without a tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    options = {"r": 8, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(0)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05).copy_(weight.data.bfloat16())
        if "lora_A" in name:
            weight.data.copy_(weight.data.bfloat16())
    made.save_pretrained(folder)
    return folder


def _go_on(adapter, tmp_path, *words):
    return [
        *few_pairs(tmp_path / "pairs.jsonl"),
        "trl.logging_steps=1",
        f"model.path={adapter}",
        "model.tuning=lora",
        *words,
    ]


def _losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def _scores_of(prompts, completions, **_):
    return scored_by_text.gold_rewards(prompts, [each[0]["content"] for each in completions])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "store"),
    [*itertools.product(["dpo", "kto", "orpo", "simpo"], ["true", "false"]), ("online_dpo", "auto")],
)
def test_an_adapter_goes_on_as_it_does_in_plain_trl_and_is_measured_from_its_own_start(
    method, store, adapter, tmp_path
):
    words = _go_on(adapter, tmp_path, f"method={method}", "trl.learning_rate=1e-2", f"speed.reference_store={store}")
    online = method == "online_dpo"
    cfg = compose([*words, "judge.module=tests.scored_by_text", "trl.max_new_tokens=24"] if online else words)
    result = train(cfg, tmp_path / "run")
    settings = check(cfg)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = read_data(settings, tokenizer).train
    args = build_arguments(settings, rows, tmp_path / "trl", 96)
    args.eval_strategy, args.save_strategy, args.precompute_ref_log_probs = "no", "no", False
    theirs = get_class(settings.method.trainer)(
        model=_adapted(adapter, is_trainable=True),
        args=args,
        train_dataset=as_texts(rows, settings.method.rows),
        processing_class=tokenizer,
        **({"reward_funcs": _scores_of} if online else {}),
    )
    theirs.train()
    expected = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    assert _losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5) and len(set(expected)) > 2
    assert abs(result.start["probe/margin_nats"]) < 1e-3 < abs(result.final["probe/margin_nats"])
    assert result.start["probe/kl_reverse_rb_nats"] < 1e-6 < result.final["probe/kl_reverse_rb_nats"]


@pytest.mark.slow
def test_a_fresh_4_bit_run_resumes_to_the_last_bit(tmp_path):
    words = [*few_pairs(tmp_path / "pairs.jsonl"), "model.tuning=qlora", "trl.learning_rate=1e-2", "trl.save_steps=2"]
    train(compose(words), tmp_path / "whole")
    halved = _halve(tmp_path / "whole")
    train(compose(words), halved)
    assert differences(tmp_path / "whole", halved) == []


def _halve(whole):
    """A copy of a run of four steps that was killed after the second."""
    halved = shutil.copytree(whole, whole.with_name("halved"))
    for name in ("result.json", "model", "checkpoints/checkpoint-4"):
        path = halved / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return halved


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
@pytest.mark.parametrize("method", ["dpo", "online_dpo"])
def test_a_whole_second_model_as_the_reference_of_an_adapter_that_goes_on_is_counted(
    method, tuning, adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr(online_dpo_trainer, "create_reference_model", None)  # a copy that nobody has counted
    settings = check(compose(_go_on(adapter, tmp_path, f"method={method}", f"model.tuning={tuning}")))
    tokenizer, run = load_tokenizer(settings.model), RunDirectory(tmp_path / "run")
    data = read_data(settings, tokenizer)
    trainer = build_trainer(settings, data, tokenizer, run, JudgedReward(None, 0) if settings.judge else None)
    planned, policy = plan_run(settings), trainer.model
    second = getattr(trainer, "ref_model", None)
    assert (second is not None) == (planned.memory["reference"] > 0) == (method == "online_dpo")
    assert sorted(policy.peft_config) == (["default"] if second else ["default", "ref"])
    assert planned.parameters == sum(p.numel() for p in build_weightless(settings, trainer.args).parameters())
    if second and tuning == "lora":
        held = sum(p.numel() * p.element_size() for p in second.parameters())
        assert planned.memory["reference"] == pytest.approx(held, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_a_run_that_goes_on_with_an_adapter_resumes_to_the_last_bit_and_is_merged(method, tuning, adapter, tmp_path):
    words = _go_on(adapter, tmp_path, f"method={method}", f"model.tuning={tuning}", "trl.learning_rate=1e-2")
    whole = tmp_path / "whole"
    train(compose([*words, "trl.save_steps=2"]), whole)
    halved = _halve(whole)
    train(compose([*words, "trl.save_steps=2"]), halved)
    assert differences(whole, halved) == []
    assert not (whole / "model" / "ref").exists() and read_json(whole / "model" / "adapter_config.json")["r"] == 8
    base = "dequantised" if tuning == "qlora" else "original"
    assert export_run(RunDirectory(whole), tmp_path / "export", base=base)["greedy"] == 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    if tuning == "lora":
        ids = torch.arange(5, 45)[None]
        expected = _adapted(whole / "model")(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-3)
        assert not torch.allclose(_adapted(adapter)(input_ids=ids).logits, expected, atol=1e-2)


@pytest.mark.slow
def test_a_run_s_adapter_is_gone_on_with_and_its_origin_is_told(tmp_path):
    first = [*few_pairs(tmp_path / "pairs.jsonl"), "model.tuning=lora", "model.lora.r=4", "trl.learning_rate=1e-2"]
    train(compose(first), tmp_path / "first")
    words = _go_on(tmp_path / "first" / "model", tmp_path, "method=ipo", "trl.learning_rate=1e-2")
    train(compose(words), tmp_path / "second")
    told = read_json(tmp_path / "second" / "manifest.json")["model"]
    assert told["parent"]["run"] == str(tmp_path / "first") and told["parent"]["method"] == "dpo"
    assert told["adapter"]["r"] == 4 and told["adapter"]["base"] == str(MODEL)
    assert told["adapter"]["reference"] == "the adapter as it started, on its base"
    card = (tmp_path / "second" / "model" / "README.md").read_text()
    assert f"Goes on from the LoRA (r 4, alpha 32) on `{MODEL}`; reference: the adapter as it started" in card
    script = write_reproduction(RunDirectory(tmp_path / "second"), tmp_path / "script")
    assert "is_trainable=True" in script.read_text() and "LoraConfig" not in script.read_text()
    again = runpy.run_path(str(script))["trainer"].state.log_history
    assert _losses(tmp_path / "second") == pytest.approx([row["loss"] for row in again if "loss" in row], rel=1e-5)
    weights = tmp_path / "first" / "model" / "adapter_model.safetensors"
    assert plan_run(check(compose(words))).memory["parameters"] > 2 * weights.stat().st_size


def test_the_reference_of_an_adapter_that_goes_on_is_its_start_in_every_part_of_the_house(adapter):
    from dpo_kit.evaluate.job import Candidate

    model = _model(f"model.path={adapter}", "model.tuning=lora")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = _adapted(adapter)(input_ids=ids).logits
        for found in (load_policy(model, load_tokenizer(model)), load_reference(model), Candidate("its", model).load()):
            assert torch.allclose(found(input_ids=ids).logits, expected, atol=1e-5)
        bare = AutoModelForCausalLM.from_pretrained(MODEL)(input_ids=ids).logits
        assert not torch.allclose(bare, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("r=4", "r: 4 asked, 8 there"),
        pytest.param("lora_alpha=99", "lora_alpha: 99 asked, 12 there", marks=pytest.mark.slow),
        pytest.param("use_dora=true", "use_dora: True asked, False there", marks=pytest.mark.slow),
        pytest.param(
            "target_modules=[q_proj]", r"target_modules: \['q_proj'\] asked, \[.*\] there", marks=pytest.mark.slow
        ),
    ],
)
def test_options_of_another_adapter_than_the_one_that_is_there_are_refused(option, said, adapter):
    words = [f"model.path={adapter}", "model.tuning=lora", "tracking=none"]
    with pytest.raises(ConfigError, match=f"{said}.*leave these options out"):
        plan_run(check(compose([*words, f"model.lora.{option}"])))
    plan_run(check(compose([*words, "model.lora.target_modules=[down_proj,q_proj]", "model.lora.r=8"])))


def test_an_adapter_of_another_kind_or_without_its_base_is_refused(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    there = json.loads(file.read_text())
    model = _model(f"model.path={folder}", "model.tuning=lora")
    for change, said in (
        ({"peft_type": "IA3"}, "is an adapter of kind IA3, not a LoRA"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "gone does not exist"),
    ):
        file.write_text(json.dumps(there | change))
        with pytest.raises(ModelError, match=said):
            load_tokenizer(model)


def test_an_adapter_on_embeddings_is_copied_whole_and_refused_where_trl_would_not():
    options = {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}
    policy = get_peft_model(tiny.model(), LoraConfig(**options))
    for name, weight in policy.named_parameters():
        weight.data.normal_() if "lora_" in name else None
    keep_start(policy)
    weights = dict(policy.named_parameters())
    copied = [name for name in weights if OF_ADAPTER.search(name)]
    assert len(copied) == 2 * 3  # A and B of the embedding and of each layer's q_proj
    assert all(torch.equal(weights[name], weights[OF_ADAPTER.sub(".ref", name)]) for name in copied)
    kept = {name for name, _ in _base_weights(policy) if ".ref" in name}
    assert len(kept) == 6 and sum("lora_embedding" in name for name in kept) == 2
    with pytest.raises(ModelError, match=r"has model.embed_tokens.lora_embedding_A, which TRL leaves out"):
        refuse_uncopied(policy)
    refuse_uncopied(get_peft_model(tiny.model(), LoraConfig(**options | {"target_modules": ["q_proj"]})))


def test_an_adapter_is_read_from_safetensors_alone(adapter, tmp_path, monkeypatch):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"")
    there = {name: folder / name for name in ("adapter_config.json", "adapter_model.bin")}
    monkeypatch.setattr(origin, "_download", lambda path, name, revision: there.get(name))
    for path in (folder, "org/adapter"):
        with pytest.raises(ModelError, match=r"is an adapter without adapter_model.safetensors"):
            load_start(_model(f"model.path={path}", "model.tuning=lora"))


@pytest.mark.slow
def test_a_run_that_would_go_on_with_an_adapter_on_embeddings_is_refused_or_measured_from_its_start(tmp_path):
    options = {"r": 2, "target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**options))
    for name, weight in made.named_parameters():
        weight.data.normal_(std=0.05) if "lora_" in name else None
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    words = _go_on(tmp_path / "adapter", tmp_path, "trl.max_steps=2")
    with pytest.raises(ModelError, match="lora_embedding_A, which TRL leaves out"):
        train(compose([*words, "method=dpo"]), tmp_path / "refused")
    with pytest.raises(ModelError, match="lora_embedding_A, which TRL leaves out"):
        plan_run(check(compose([*words, "method=dpo"])))
    result = train(compose([*words, "method=orpo"]), tmp_path / "run")
    assert abs(result.start["probe/margin_nats"]) < 1e-3
