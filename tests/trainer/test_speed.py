"""Faster, and the same training: losses of TRL's trainers with each lever on and off."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from trl.kernels import chunked_logprob
from trl.kernels.chunked_logprob import _addmm_fp32, _use_triton
from trl.trainer import utils as trl_utils

from dpo_kit import compose
from dpo_kit.config.compose import check
from dpo_kit.config.settings import Speed
from dpo_kit.errors import ConfigError
from dpo_kit.model.hardware import precision_arguments, training_precision
from dpo_kit.trainer import build, memory
from dpo_kit.trainer.build import choose_arguments
from dpo_kit.trainer.on_gpu import fuse_norms
from dpo_kit.trainer.prefix import share_prefixes
from dpo_kit.trainer.speed import (
    count_weights_once,
    fit_head_to_cpu,
    score_labelled_positions_only,
    speed_up,
)
from tests import tiny

STEPS = 50
LONG = {"max_steps": STEPS, "learning_rate": 1e-3, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def losses(kind, folder, tmp_path, *, share, **options):
    models = {
        name: LlamaForCausalLM.from_pretrained(folder)
        for name in ("model", "ref_model")[: 1 + (kind in ("dpo", "kto"))]
    }
    if "peft_config" in options:
        models.pop("ref_model", None)
    for model in models.values() if share else ():
        share_prefixes(model)
    trainer = tiny.trainer(kind, folder, tmp_path, **LONG | models | options)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "cpo", "simpo"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="full"),
        pytest.param({"peft_config": tiny.LORA}, id="lora", marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "max_length": 7}, id="checkpointed and truncated"),
    ],
)
def test_losses_of_fifty_steps_stay_the_same_when_each_token_is_computed_once(kind, options, folder, tmp_path):
    expected = losses(kind, folder, tmp_path / "padded", share=False, **options)
    found = losses(kind, folder, tmp_path / "shared", share=True, **options)
    assert len(found) == STEPS and found == pytest.approx(expected, rel=1e-5)


def test_in_bf16_the_losses_stay_within_its_own_rounding(folder, tmp_path):
    short = {"max_steps": 5, "bf16": True}
    expected = losses("dpo", folder, tmp_path / "padded", share=False, **short)
    found = losses("dpo", folder, tmp_path / "shared", share=True, **short)
    assert found == pytest.approx(expected, rel=2e-2) and found != expected


# --- the head ----------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """How many positions each call of TRL's fused head scores, in `scored`; its own choice of them to begin with."""
    counts = []
    real = trl_utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(trl_utils, "_use_triton", _use_triton)
    monkeypatch.setattr(
        trl_utils._ChunkedLogProbFunction, "apply", lambda *told: counts.append(len(told[0])) or real(*told)
    )
    return counts


def test_trl_scores_every_position_on_a_cpu_and_with_us_only_the_labelled_ones_with_equal_losses(
    scored, folder, tmp_path
):
    short = {"max_steps": 3}
    expected = losses("dpo", folder, tmp_path / "stock", share=False, **short)
    every = list(scored)
    scored.clear()
    score_labelled_positions_only()
    assert losses("dpo", folder, tmp_path / "ours", share=False, **short) == pytest.approx(expected, rel=1e-6)
    assert len(scored) == len(every) and all(ours < stock / 1.5 for ours, stock in zip(scored, every, strict=True))


@pytest.mark.parametrize(("autocast", "noise"), [(False, 1e-5), (True, 2e-3)], ids=["fp32", "bf16"])
def test_the_head_fitted_to_a_cpu_gives_trl_s_values_and_gradients(autocast, noise, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", chunked_logprob.TOKEN_CHUNK_SIZE)
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", _addmm_fp32)
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 32, generator=draw, requires_grad=True) for n in (300, 90))
    targets, pull = torch.randint(90, (300,), generator=draw), torch.randn(300, generator=draw)

    def values():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = chunked_logprob.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64)
        return [
            *(each.detach().float() for each in found if each is not None),
            *torch.autograd.grad(found[0], (hidden, weight), pull),
        ]

    expected, tiles = values(), []
    fit_head_to_cpu()
    monkeypatch.setattr(chunked_logprob, "_forward_tile", _counted(chunked_logprob._forward_tile, tiles))
    for ours, theirs in zip(values(), expected, strict=True):
        assert float((ours - theirs).abs().max()) <= noise * float(theirs.abs().max())
    assert tiles == [128, 128, 128, 128, 44, 44]
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def _counted(function, sizes):
    return lambda tile, *told, **options: sizes.append(len(tile)) or function(tile, *told, **options)


# --- what is chosen ----------------------------------------------------------------------------------------------

DROPS = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=14,
                    attention_dropout=0.1)  # fmt: skip
SEQUENTIAL = {"train_sampling_strategy": "sequential"}


def asked(share, group="auto"):
    return Speed(reference_store="auto", share_prefix=share, group_by_length=group, checkpointing="auto")


def test_what_a_model_cannot_do_is_left_off_and_said_under_auto_and_refused_when_asked_for(caplog):
    model = AutoModelForCausalLM.from_config(DROPS)
    with caplog.at_level(logging.INFO, "dpo_kit"):
        assert speed_up([model], asked("auto"), {})
    assert "a prompt cannot be computed once for both answers: its attention has dropout" in caplog.text
    assert "padding is computed, and a pair's prompt twice; batches of similar length" in caplog.text
    with pytest.raises(
        ConfigError, match=r"speed.share_prefix=true cannot be had .* its attention has dropout; auto leaves it off"
    ):
        speed_up([model], asked(True), {})


@pytest.mark.parametrize(("share", "computed"), [("auto", 12), (False, 20)])
def test_the_policy_computes_distinct_tokens_unless_it_is_told_not_to(share, computed, folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    assert not speed_up([model], asked(share), {})
    seen = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda *told: seen.append(told[2].shape[:-1].numel()))
    ids = torch.tensor([[3] * 10, [3] * 8 + [4] * 2])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert seen == [computed]


@pytest.mark.parametrize(
    ("share", "group", "trl", "grouped"),
    [(False, True, {}, True), ("auto", False, {}, False), ("auto", "auto", SEQUENTIAL, False)],
)
def test_batches_of_similar_length_are_made_where_padding_must_be_computed_and_order_is_free(
    share, group, trl, grouped
):
    assert speed_up([AutoModelForCausalLM.from_config(DROPS)], asked(share, group), trl) is grouped


@pytest.mark.parametrize(
    ("able", "width", "precision"),
    [
        ({"avx512_bf16": True}, 256, "bfloat16"),
        ({"amx_bf16": True}, 4096, "bfloat16"),
        ({"avx512_bf16": True}, 96, "float32"),
        ({"avx2": True}, 4096, "float32"),
    ],
)
def test_a_cpu_trains_wide_models_in_bf16_where_it_multiplies_it(able, width, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert training_precision(width) == precision
    left_open = {"use_cpu": None, "bf16": None, "fp16": False}
    assert precision_arguments(left_open, width) == {"use_cpu": True, "bf16": precision == "bfloat16"}
    assert "bf16" not in precision_arguments(left_open | {"bf16": False}, width)


@pytest.mark.parametrize(
    ("words", "free", "on"),
    [
        ([], 2**40, False),
        ([], 2**20, True),
        (["speed.checkpointing=false"], 2**20, False),
        (["speed.checkpointing=true"], 2**40, True),
        (["trl.gradient_checkpointing=false"], 2**20, False),
    ],
)
def test_activations_are_computed_again_where_memory_would_not_do_or_asked(words, free, on, monkeypatch, tmp_path):
    settings = check(compose(words))
    rows = [{"tokens": {"prompt": 20, "chosen": 10, "rejected": 8}}] * 40
    for module in (build, memory):
        monkeypatch.setattr(module, "free_memory", lambda: free)
    assert choose_arguments(settings, SimpleNamespace(train=rows), tmp_path).gradient_checkpointing is on


# --- norms and counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fused_norm_gives_hidden_states_and_gradients_of_the_one_that_is_written_out(dtype, folder):
    results = []
    for fused in (False, True):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        norm = model.base_model.layers[0].input_layernorm
        norm.weight.data.mul_(torch.linspace(0.5, 2, len(norm.weight), dtype=dtype))
        assert not fused or (fuse_norms(model) and "forward" in vars(norm))
        hidden = model.base_model(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append([hidden.detach().float(), norm.weight.grad.float(), model.lm_head.weight.data.float()])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_norm_that_adds_one_to_its_weight_is_left_as_it_is():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 14}
    model = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(**sizes, head_dim=8, num_attention_heads=2, num_key_value_heads=1)
    )
    assert not fuse_norms(model) and not any("forward" in vars(module) for module in model.modules())
    model = AutoModelForCausalLM.from_config(DROPS)
    norm = model.base_model.norm
    norm.forward = lambda hidden: hidden * (1 + norm.weight)
    assert not fuse_norms(model)


def test_transformers_counts_the_weights_at_every_batch_and_with_us_once(folder, tmp_path, monkeypatch):
    counts = []
    real = LlamaForCausalLM.num_parameters
    monkeypatch.setattr(
        LlamaForCausalLM, "num_parameters", lambda model, **told: counts.append(1) or real(model, **told)
    )
    flops = []
    for ours in (False, True):
        counts.clear()
        model = LlamaForCausalLM.from_pretrained(folder)
        if ours:
            count_weights_once(model)
        trainer = tiny.trainer("dpo", folder, tmp_path / str(ours), model=model, **LONG | {"max_steps": 4})
        trainer.train()
        flops.append(trainer.state.total_flos)
        assert len(counts) <= 2 if ours else len(counts) >= 4
    assert flops[0] == flops[1] > 0
