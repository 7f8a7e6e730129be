"""Model families that TRL, PEFT or generation trip over: made to work, or refused in one sentence before any weight."""

import re
import runpy
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from dpo_kit import ConfigError, ModelError, compose, train
from dpo_kit.cli.plan import plan_run
from dpo_kit.config.compose import CONF, check
from dpo_kit.model.adapter import build_adapter, fit_targets
from dpo_kit.model.batches import mlp_width
from dpo_kit.model.load import PLAIN, is_plain, load_weights
from dpo_kit.model.origin import refuse_start
from dpo_kit.model.sampling import draw_samples
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.history import read_metrics
from dpo_kit.toy import MODEL
from dpo_kit.trainer import families
from dpo_kit.trainer.families import switch_off_noise
from tests import tiny
from tests.conftest import ROOT
from tests.small import few_pairs

SMALL = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 4,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {"layer_types": ["full_attention"] * 2, "mamba_n_heads": 4}
MIXER = {"state_size": 8, "mamba_d_state": 8, "mamba_dt_rank": 4, "time_step_rank": 4, "expand": 2}


def config_of(family, **own):
    """The config of a random model of `family` with two layers."""
    names = {*CONFIG_MAPPING[family]().to_dict(), *CONFIG_MAPPING[family].attribute_map}
    wanted = SMALL | EXPERTS | MIXER | own
    return CONFIG_MAPPING[family](**{name: value for name, value in wanted.items() if name in names or name in own})


def model_of(family, **own):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **own)).float()


def saved(folder, family, weights=True, **own):
    """A folder with a random model of `family`, or its config alone, and the embedded tokenizer."""
    (model_of(family, **own) if weights else config_of(family, **own)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder)
    return folder


def words(folder, tmp_path, *more):
    given = [*few_pairs(tmp_path / "pairs.jsonl"), "model=local", f"model.path={folder}", "allow_learning_rate=true"]
    return [*given, "data.gold=null", "trl.max_length=128", *more]


def refused_before_weights(folder, tmp_path, error, match, *more):
    """A dry run, and a run whose weights are not there, both say `match`."""
    with pytest.raises(error, match=match):
        plan_run(check(compose(words(folder, tmp_path, *more))))
    with pytest.raises(error, match=match):
        train(compose(words(folder, tmp_path, *more)), tmp_path / "run")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "own", "what"),
    [
        ("t5", {"d_model": 32}, "is an encoder-decoder"),
        ("bart", {"d_model": 32}, "is an encoder-decoder"),
        ("qwen2_vl", {}, "is a vision model whose text part cannot be had alone"),
        ("vit", {}, "is no language model that generates"),
        ("cpmant", {}, "is an encoder, in which a token sees those after it"),
        ("roberta", {}, "is an encoder, in which a token sees those after it"),
        ("bert-generation", {}, "is an encoder, in which a token sees those after it"),
    ],
)
def test_what_is_no_decoder_of_text_is_refused_in_a_sentence(family, own, what, tmp_path):
    folder = saved(tmp_path / "model", family, weights=False, **own)
    refused_before_weights(
        folder, tmp_path, ModelError, rf"{what} \(model_type {family}\).*name a causal language model"
    )


@pytest.mark.parametrize(
    ("method", "tuning", "said"),
    [
        ("gptq", "lora", r"quantised with gptq, which cannot be read here: .*requires.*take the original repository"),
        ("awq", "lora", r"quantised with awq, which cannot be read here: .*Install what is missing"),
        ("gptq", "full", r"published in a quantised form \(gptq\), whose weights cannot be tuned"),
    ],
)
def test_a_quantised_base_whose_package_is_missing_is_named(method, tuning, said, tmp_path):
    folder = saved(tmp_path / "model", "qwen2", weights=False)
    given = {"quant_method": method, "bits": 4, "group_size": 128}
    write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": given})
    refused_before_weights(folder, tmp_path, ModelError, said, f"model.tuning={tuning}")


def test_rows_and_answers_past_the_last_learned_position_are_refused_with_the_number_to_type(tmp_path):
    folder = saved(tmp_path / "model", "opt", weights=False, max_position_embeddings=40, word_embed_proj_dim=32)
    refused_before_weights(folder, tmp_path, ConfigError, r"knows 40 positions, and rows .*: say trl\.max_length=40")
    more = ["trl.max_length=40", "callbacks.max_new_tokens=32"]
    with pytest.raises(
        ConfigError, match=r"knows 40 positions, and answers .*say callbacks\.max_new_tokens=\d+$"
    ) as told:
        plan_run(check(compose(words(folder, tmp_path, *more))))
    plan_run(check(compose(words(folder, tmp_path, "trl.max_length=40", str(told.value).rpartition("say ")[2]))))


def test_positions_that_are_worked_out_have_no_end(tmp_path):
    folder = saved(tmp_path / "model", "olmo2", weights=False, max_position_embeddings=20)
    plan_run(check(compose(words(folder, tmp_path))))


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("doge", {"is_moe": True, "num_experts": 16}),  # another auxiliary loss than Mixtral's
        ("granitemoehybrid", HYBRID | {"num_local_experts": 0}),  # dense, as Granite 4 micro
    ],
)
def test_an_auxiliary_loss_that_trl_cannot_work_out_is_refused_with_the_key(family, own, tmp_path):
    folder = saved(tmp_path / "model", family, weights=False, router_aux_loss_coef=0.01, **own)
    said = r"trl\.router_aux_loss_coef=0\.01 \(of the model\): .*trl\.router_aux_loss_coef=0 trains without"
    refused_before_weights(folder, tmp_path, ConfigError, said)
    plan_run(check(compose(words(folder, tmp_path, "trl.router_aux_loss_coef=0"))))
    plan_run(check(compose(words(folder, tmp_path, "method=orpo"))))


def test_an_auxiliary_loss_that_trl_works_out_is_taken():
    for family, own in (("olmoe", {}), ("granitemoehybrid", HYBRID)):
        config = config_of(family, router_aux_loss_coef=0.01, **own)
        families._add_aliases(config)
        families._refuse_no_balance(check(compose(["tracking=none"])), config)


def test_an_adapter_with_more_embeddings_than_its_base_is_refused_with_the_lines_that_merge_it(tmp_path):
    base, larger = saved(tmp_path / "base", "qwen2"), model_of("qwen2")
    larger.resize_token_embeddings(648)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = get_peft_model(larger, lora)
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model = check(compose(["model=local", f"model.path={tmp_path / 'adapter'}", "model.tuning=lora"])).model
    with pytest.raises(ModelError, match=r"has 640: resize the base .*resize_token_embeddings\(648\)") as told:
        refuse_start(model)
    lines = str(told.value).partition("first: ")[2].replace("'merged'", repr(str(tmp_path / "merged")))
    exec(lines, {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel})
    assert AutoConfig.from_pretrained(tmp_path / "merged").vocab_size == 648
    made.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
    refuse_start(model.model_copy(update={"path": str(tmp_path / "bare")}))


# --- LoRA ----------------------------------------------------------------------------------------------------------


def adapted(family, **own):
    """A model with our default adapter, and its parts that a step reaches."""
    policy = model_of(family, **own)
    adapter = build_adapter(check(compose(["model=local", "model.path=x", "model.tuning=lora"])).model)
    fit_targets(adapter, policy, DPOTrainer)
    made = get_peft_model(policy, adapter).train()
    for name, weight in made.named_parameters():
        weight.data.normal_(std=0.1) if "lora_B" in name else None
    return made


@pytest.mark.parametrize("family", ["mamba", "jamba", "falcon_h1", "qwen3_moe", "mixtral", "granitemoe", "olmoe"])
def test_the_default_adapter_is_trained_in_every_part(family):
    """Mixtures of experts take no dropout, and state-space mixers read some weights past their modules."""
    made = adapted(family)
    made(input_ids=torch.arange(5, 45)[None], use_cache=False).logits.square().sum().backward()
    parts = {name: weight.grad for name, weight in made.named_parameters() if weight.requires_grad}
    assert parts and [name for name, grad in parts.items() if grad is None or not grad.abs().sum()] == []


def test_peft_still_adapts_what_a_mixer_reads_past_its_module():
    """When this fails, PEFT leaves such modules out by itself, and fit_targets need not."""
    made = get_peft_model(model_of("jamba"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    made(input_ids=torch.arange(5, 45)[None], use_cache=False).logits.square().sum().backward()
    assert any("dt_proj" in name and w.grad is None for name, w in made.named_parameters() if w.requires_grad)


def test_what_is_named_and_would_not_be_trained_is_refused_and_what_peft_refuses_is_told(tmp_path):
    folder = saved(tmp_path / "jamba", "jamba", weights=False)
    lora = ["model.tuning=lora", "model.lora.target_modules=[in_proj,dt_proj]"]
    with pytest.raises(ConfigError, match=r"on model\.layers\.0\.mamba\.dt_proj, .*reads past the module"):
        plan_run(check(compose(words(folder, tmp_path, *lora))))
    folder = saved(tmp_path / "moe", "qwen3_moe", weights=False)
    lora = ["model.tuning=lora", "model.lora.lora_dropout=0.1"]
    with pytest.raises(ConfigError, match=r"model\.lora: PEFT refuses it for this model: .*lora_dropout != 0"):
        plan_run(check(compose(words(folder, tmp_path, *lora))))


def test_an_attention_s_own_weights_are_left_to_the_adapter():
    adapter = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    fit_targets(adapter, tiny.model(), DPOTrainer)
    assert adapter.exclude_modules is None
    policy = model_of("bloom", n_layer=2, n_head=4)  # reads slices of some, in a mode that is off
    fit_targets(adapter, policy, DPOTrainer)
    assert adapter.exclude_modules is None


# --- noise, balance, logits ----------------------------------------------------------------------------------------

DROPPING = {
    "opt": {"dropout": 0.3, "word_embed_proj_dim": 32},
    "xglm": {"dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3, "d_model": 32, "num_layers": 2},
    "biogpt": {"hidden_dropout_prob": 0.3, "layerdrop": 0.3},
    "qwen2": {"attention_dropout": 0.3},
    "phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
}


@pytest.mark.parametrize("family", DROPPING)
def test_dropout_and_jitter_that_trl_cannot_switch_off_are_off(family):
    model, ids = model_of(family, **DROPPING[family]).train(), torch.arange(5, 45)[None]
    disable_dropout_in_model(model)

    def twice():
        return [model(input_ids=ids, use_cache=False).logits for _ in range(2)]

    assert not torch.equal(*twice())  # when this fails, TRL reaches it by itself
    switch_off_noise(model)
    assert torch.equal(*twice())


def test_a_family_with_dropout_is_not_plain_and_one_without_is():
    assert is_plain(AutoConfig.from_pretrained(MODEL))
    assert not is_plain(config_of("qwen2", attention_dropout=0.1)) and not is_plain(config_of("opt"))


@pytest.mark.parametrize("family", PLAIN)
def test_of_plain_families_there_is_nothing_to_say(family):
    config, model = config_of(family), model_of(family)
    assert families._positions(config) is None and not config.is_encoder_decoder
    assert not any(hasattr(config, name) for names in families.ALIASES.values() for name in names)
    assert not hasattr(config, "output_router_logits") and is_plain(config)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    switch_off_noise(model)
    assert all(vars(module) == before[name] for name, module in model.named_modules())


def test_a_mixture_of_experts_that_returns_router_logits_is_sampled(caplog):
    model, tokenizer = model_of("mixtral", output_router_logits=True), AutoTokenizer.from_pretrained(MODEL)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("hello", "what is the time now")]
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(RuntimeError, match="must match the size"):  # when this fails, transformers has mended it
        model.generate(input_ids=mask * 7, attention_mask=mask, max_new_tokens=4)
    samples = draw_samples(model, tokenizer, rows, max_new_tokens=4)
    assert all(sample.token_ids for sample in samples) and model.config.output_router_logits


def _fused(model, ids, **options):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True, **options)


@pytest.mark.parametrize("family", ["granitemoe", "phimoe"])
def test_the_auxiliary_loss_is_the_model_s_own_where_trl_looks_for_another_name(family, monkeypatch):
    model, ids = model_of(family, router_jitter_noise=0.0), torch.arange(5, 45)[None]
    kind = type(model.config)
    others = {name: own for name, own in kind.attribute_map.items() if name != "num_experts"}
    monkeypatch.setattr(kind, "attribute_map", others)
    add_fused_lm_head(model)
    with pytest.raises(AttributeError, match="num_experts"):  # when this fails, TRL knows the name (trl#6208)
        _fused(model, ids, output_router_logits=True)
    families._add_aliases(model.config)
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_router_logits=True, use_cache=False).aux_loss
    assert _fused(model, ids, output_router_logits=True).aux_loss.item() == pytest.approx(own.item())
    assert "num_experts" not in model.config.to_dict()


def test_a_cap_of_logits_under_another_name_is_the_model_s_own(monkeypatch):
    own = {
        "logits_soft_cap": 1.5,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
    }
    model, ids = model_of("recurrent_gemma", head_dim=8, **own), torch.arange(5, 25)[None]
    expected = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    kind = type(model.config)
    others = {name: own for name, own in kind.attribute_map.items() if "softcapping" not in name}
    monkeypatch.setattr(kind, "attribute_map", others)
    add_fused_lm_head(model)
    assert not torch.allclose(_fused(model, ids).log_probs, expected, atol=1e-2)
    model = model_of("recurrent_gemma", head_dim=8, **own)
    families._add_aliases(model.config)
    add_fused_lm_head(model)
    assert torch.allclose(_fused(model, ids).log_probs, expected, atol=1e-4)


def _trainer(folder, output):
    rows = [{"prompt": "hello", "chosen": f" {n}", "rejected": f" {n + 1}"} for n in range(8)]
    args = DPOConfig(output_dir=str(output), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    from datasets import Dataset

    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize(
    ("family", "own", "said"),
    [
        ("bert", {"is_decoder": True}, r"the logits of a bert are not its head on its last hidden states.*method=orpo"),
        ("bert", {}, r"in a bert a token sees those after it"),
        ("gpt_neox", {}, None),
    ],
)
def test_logits_that_the_loss_would_not_read_are_found_out_before_the_first_step(family, own, said, tmp_path):
    trainer = _trainer(saved(tmp_path / "model", family, **own), tmp_path)
    if said is None:
        families.fit_trainer(trainer)
        return
    with pytest.raises(ModelError, match=said):
        families.fit_trainer(trainer)


def test_sizes_that_a_family_has_not_or_has_per_layer_are_read():
    assert (
        mlp_width(config_of("mamba")) > 0 and mlp_width(config_of("gemma3n_text", intermediate_size=[64, 128])) == 128
    )


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "qwen3_moe", "granitemoe", "opt"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_in_an_odd_family_starts_at_ln_2(family, tuning, tmp_path):
    own = {"mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1}, "opt": {"dropout": 0.3, "word_embed_proj_dim": 32}}
    folder = saved(tmp_path / "model", family, **own.get(family, {}))
    more = ["trl.logging_steps=1", "trl.router_aux_loss_coef=0", f"model.tuning={tuning}"]
    train(compose(words(folder, tmp_path, *more)), tmp_path / "run")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)


# --- options of today's models -------------------------------------------------------------------------------------

FAMILY_OF = {
    "smollm2": "llama",
    "smollm3": "smollm3",
    "smollm3-nothink": "smollm3",
    "qwen3": "qwen3",
    "qwen3-nothink": "qwen3",
    "llama3.2-1b": "llama",
    "gemma3-1b": "gemma3_text",
    "olmo2-1b": "olmo2",
    "olmo3-7b": "olmo3",
    "mistral-small": "mistral",
    "phi4-mini": "phi3",
    "gpt-oss": "gpt_oss",
}


@pytest.mark.parametrize("option", FAMILY_OF)
def test_the_option_of_a_model_composes_with_what_is_particular_to_it(option):
    settings = check(compose([f"model={option}", "tracking=none"]))
    own = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text())
    assert "/" in settings.model.path and settings.model.path == own.get("path", settings.model.path)
    thinks = {"enable_thinking": False} if option.endswith("nothink") else {}
    assert settings.data.chat_template_kwargs == thinks
    assert settings.model.tuning == {"gpt-oss": "lora", "mistral-small": "qlora"}.get(option, "full")


def test_a_template_s_options_of_a_model_are_those_of_its_data_unless_these_say_others():
    said = "data.chat_template_kwargs={enable_thinking: true}"
    assert check(compose(["model=qwen3-nothink", said])).data.chat_template_kwargs == {"enable_thinking": True}


def test_the_family_of_every_option_has_its_row_in_the_table():
    table = (ROOT / "docs" / "families.md").read_text()
    assert all(f"| `{family}` |" in table for family in FAMILY_OF.values())


def test_weights_in_mxfp4_are_read_as_what_can_be_trained(monkeypatch, tmp_path):
    folder = saved(tmp_path / "model", "gpt_oss", weights=False)
    given = {"quantization_config": {"quant_method": "mxfp4"}}
    write_json(folder / "config.json", read_json(folder / "config.json") | given)
    (folder / "model.safetensors").touch()
    asked = {}
    monkeypatch.setattr(
        "dpo_kit.model.load.load_named", lambda *_, **options: asked.update(options) or model_of("gpt_oss")
    )
    load_weights(check(compose(["model=gpt-oss", f"model.path={folder}"])).model)
    assert asked["quantization_config"].dequantize


def test_the_tables_hold_more_than_fifty_families_and_no_fault():
    tables = (ROOT / "docs" / "families.md").read_text().partition("## Tried")[2]
    assert len(set(re.findall(r"`([\w-]+)`", tables)) & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}) > 51
    assert "FAULT" not in tables and "off by" not in tables


@pytest.mark.slow
def test_the_script_of_the_tables_tries_a_family(capsys):
    script = runpy.run_path(str(ROOT / "examples" / "benchmark" / "families.py"))
    script["main"](["only=qwen2,bart"])
    printed = capsys.readouterr().out
    assert "| `qwen2` | as TRL | as TRL |" in printed and "encoder-decoder" in printed and "FAULT" not in printed
