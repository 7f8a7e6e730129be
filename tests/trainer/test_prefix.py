"""One flat row of distinct tokens gives what padded rows give, hidden states and gradients, or it is left off."""

import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo3Config,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from dpo_kit.trainer import on_gpu, prefix
from dpo_kit.trainer.on_gpu import agrees_at_once
from dpo_kit.trainer.prefix import LaidOut, attend_row, build_layout, share_prefixes, why_not
from dpo_kit.trainer.speed import SHARING
from tests import varlen

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MIXED = ["sliding_attention", "full_attention"]
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": None, "eos_token_id": 1}
EXACT = [
    LlamaConfig(**SMALL),
    Qwen2Config(**SMALL, num_key_value_heads=2),
    Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
    MistralConfig(**SMALL, sliding_window=None, num_key_value_heads=4),
    GPTNeoXConfig(**SMALL),
    GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=128, **NO_DROPOUT),
]

WINDOWED = [
    MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5),
    Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=5, layer_types=MIXED),
    Olmo3Config(**SMALL, num_key_value_heads=2, sliding_window=7, layer_types=MIXED),
]


def model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def rows(seed, *, width=20, pairs=4):
    """Padded pairs (2 · pairs, width): rows i and i + pairs begin alike over 0 to all of their tokens."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    ids = torch.randint(2, 60, (2 * pairs, width), generator=draw)
    lengths = torch.tensor([number(1, width + 1) for _ in range(2 * pairs)])
    lengths[0] = width
    for pair in range(pairs):
        shared = (0, number(0, width), width)[min(2, pair)]  # nothing, something, the shorter one whole
        ids[pairs + pair, :shared] = ids[pair, :shared]
    mask = (torch.arange(width) < lengths[:, None]).long()
    return ids * mask, mask


def forward(policy, ids, mask):
    """Hidden states of the real tokens, and the gradient of a random projection of them."""
    policy.zero_grad()
    hidden = policy.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), torch.cat([p.grad.flatten() for p in policy.base_model.parameters() if p.grad is not None])


def test_a_layout_holds_every_token_once_and_says_where_each_slot_finds_its_own():
    ids = torch.tensor([[5, 6, 7, 8], [9, 9, 0, 0], [5, 6, 4, 0], [9, 9, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    layout = build_layout(ids, mask)
    assert layout.ids.tolist() == [[5, 6, 7, 8, 9, 9, 4, 3]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 2]]
    assert layout.source.view(4, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 6, 3], [4, 5, 7, 7]]
    assert layout.rows == ((0, 4), (0, 2), (2, 1), (2, 1))


def test_an_odd_number_of_rows_is_only_freed_of_its_padding():
    ids = torch.tensor([[5, 6], [5, 0], [5, 6]])
    layout = build_layout(ids, (ids > 0).long())
    assert layout.ids.tolist() == [[5, 6, 5, 5, 6]] and layout.rows == ((0, 2), (0, 1), (0, 2))


@pytest.mark.parametrize("config", EXACT + WINDOWED, ids=lambda config: config.model_type)
@pytest.mark.parametrize("seed", range(4))
def test_hidden_states_and_gradients_equal_those_of_padded_rows(config, seed):
    policy = model(config)
    ids, mask = rows(seed)
    expected, expected_gradient = forward(policy, ids, mask)
    assert why_not(policy) is None
    share_prefixes(policy)
    found, gradient = forward(policy, ids, mask)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-5


def test_tokens_that_fill_a_batch_up_change_nothing():
    policy = model(EXACT[0])
    policy.set_attn_implementation(SHARING)
    layout = build_layout(*rows(0))
    filled = layout.fill_up(64)
    assert filled.ids.shape[1] % 64 == 0 and 0 < filled.rest < 64 and filled.rows == layout.rows
    states = []
    for each in (layout, filled):
        given = {"input_ids": each.ids, "position_ids": each.positions, "attention_mask": torch.ones(1, 1, 1, 1)}
        states.append(policy.base_model(**given, layout=each, use_cache=False).last_hidden_state)
    torch.testing.assert_close(states[1][:, : layout.ids.shape[1]], states[0])


@pytest.mark.parametrize("config", EXACT + WINDOWED, ids=lambda config: config.model_type)
@pytest.mark.parametrize("seed", range(4))
def test_one_call_for_all_rows_gives_what_padded_rows_give(config, seed, monkeypatch):
    policy = model(config)
    ids, mask = rows(seed)
    expected, expected_gradient = forward(policy, ids, mask)
    calls = varlen.take_one_call(monkeypatch)
    assert why_not(policy) is None
    share_prefixes(policy)
    calls.clear()
    states, gradient = forward(policy, ids, mask)
    assert float((states - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-5
    layout = build_layout(ids, mask)
    read = sum(shared + own for shared, own in layout.rows if own)
    assert calls == [(layout.ids.shape[1], read)] * config.num_hidden_layers and layout.ids.shape[1] < read


def test_one_call_is_tried_out_before_it_is_relied_on(monkeypatch, caplog):
    cpu, works = torch.device("cpu"), agrees_at_once.__wrapped__
    with caplog.at_level("INFO", "dpo_kit"):
        assert not works(cpu, torch.bfloat16, 8, 2)  # PyTorch has no such kernel for a CPU
        monkeypatch.setattr(on_gpu, "varlen_attn", varlen.varlen_attn)
        assert works(cpu, torch.bfloat16, 8, 2) and works(cpu, torch.float32, 8, 1)
        off_by_one = lambda *given, window_size, **more: varlen.varlen_attn(  # noqa: E731
            *given, window_size=(window_size[0] + (window_size[0] > 0), 0), **more
        )
        monkeypatch.setattr(on_gpu, "varlen_attn", off_by_one)
        assert not works(cpu, torch.float32, 8, 2)
    said = [record.getMessage() for record in caplog.records]
    assert all(line.startswith("attention is worked out row by row: ") for line in said)
    assert "_flash_attention_forward" in said[0] and "gives other values" in said[1]


def test_keys_stand_where_they_are_when_nothing_is_shared_and_rows_without_own_tokens_are_left_out():
    ids = torch.tensor([[5, 6, 7], [8, 9, 0], [5, 6, 0], [3, 0, 0]])
    layout = build_layout(ids, (ids > 0).long())
    assert layout.rows == ((0, 3), (0, 2), (2, 0), (0, 1))
    assert layout.keys.tolist() == [0, 1, 2, 3, 4, 5] and layout.longest == (3, 3)
    assert layout.query_ends.tolist() == layout.key_ends.tolist() == [0, 3, 5, 6]
    apart = build_layout(ids[[0, 1]], (ids[[0, 1]] > 0).long())
    assert apart.keys is None and apart.query_ends.tolist() == [0, 3, 5]
    lent = build_layout(torch.tensor([[5, 6, 7], [5, 6, 4]]), torch.ones(2, 3))
    assert lent.keys.tolist() == [0, 1, 2, 0, 1, 3]
    assert (lent.query_ends.tolist(), lent.key_ends.tolist()) == ([0, 3, 4], [0, 3, 6])


def test_a_layout_made_before_the_batch_is_moved_is_the_one_that_is_taken(monkeypatch):
    ids, mask = rows(2)
    collate = LaidOut(lambda rows: {"input_ids": ids, "attention_mask": mask})
    policy = model(EXACT[0])
    share_prefixes(policy)
    expected = policy.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    batch = send_to_device(collate([]), torch.device("cpu"))
    assert torch.equal(batch["layout"].source, build_layout(ids, mask).source)
    monkeypatch.setattr(prefix, "build_layout", None)  # not asked again
    assert torch.equal(policy.base_model(**batch, use_cache=False).last_hidden_state, expected)
    assert torch.equal(pickle.loads(pickle.dumps(batch["layout"])).ids, batch["layout"].ids)  # as from a worker
    two_sets = {"input_ids": ids, "attention_mask": mask, "KL_input_ids": ids}
    assert "layout" not in LaidOut(lambda rows: dict(two_sets))([])


def test_the_gradients_of_padding_do_not_queue_for_one_token():
    ids = torch.zeros(2, 50, dtype=torch.long)
    ids[:, :5] = torch.arange(2, 12).view(2, 5)
    source = build_layout(ids, (ids > 0).long()).source
    assert int(source.bincount().max()) <= 12 and int(source.max()) == 9


@pytest.mark.parametrize("seed", range(3))
def test_in_bf16_gathered_keys_leave_gradients_as_near_to_fp32_as_padded_rows_do(seed, monkeypatch):
    """Both with the same kernel, so that only the way of laying out differs."""
    config = Qwen2Config(**SMALL | {"hidden_size": 64, "num_hidden_layers": 4}, num_key_value_heads=2)
    varlen.take_one_call(monkeypatch)
    ids, mask = rows(seed, width=40, pairs=6)
    exact = forward(model(config), ids, mask)
    errors = {}
    for shared in (True, False):
        policy = model(config).to(torch.bfloat16)
        share_prefixes(policy)
        if not shared:
            monkeypatch.setattr(prefix, "_shared_lengths", lambda ids, real: torch.zeros(len(ids), dtype=torch.long))
        states = forward(policy, ids, mask)
        errors[shared] = [
            float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(states, exact, strict=True)
        ]
    assert all(0 < ours < 1.25 * padded for ours, padded in zip(errors[True], errors[False], strict=True))


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 2, 290])
@pytest.mark.parametrize(("shared", "own"), [(0, 40), (0, 300), (20, 40), (300, 1), (30, 700), (0, 1030), (40, 1000)])
def test_a_row_s_own_tokens_see_what_the_whole_row_would_show_them(shared, own, window, dtype, noise):
    draw = torch.Generator().manual_seed(own)
    whole = [torch.randn(1, 2, shared + own, 8, generator=draw).requires_grad_() for _ in range(3)]
    given = [x.to(dtype) for x in whole]
    pull = torch.randn(1, 2, own, 8, generator=draw)
    places = torch.arange(shared + own)
    back = places[:, None] - places
    seen = (back >= 0) & (back < (window or shared + own))
    results = [
        scaled_dot_product_attention(*whole, attn_mask=seen, scale=0.4)[:, :, shared:],
        attend_row(given[0][:, :, shared:], *given[1:], 0.4, window).float(),
    ]
    expected, found = ([each.detach(), *torch.autograd.grad(each, whole, pull)] for each in results)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= noise * float(theirs.abs().max())


def test_each_distinct_token_is_computed_once():
    policy = model(LlamaConfig(**SMALL))
    share_prefixes(policy)
    seen = []
    policy.base_model.layers[0].mlp.register_forward_hook(lambda *told: seen.append(told[2].shape[:-1].numel()))
    ids, mask = torch.full((4, 10), 7), torch.ones(4, 10, dtype=torch.long)
    ids[2:, 8:] = 9
    policy(input_ids=ids, attention_mask=mask, use_cache=False)
    assert seen == [2 * 10 + 2 * 2]


def test_a_batch_in_which_nothing_is_saved_goes_through_as_it_is():
    policy = model(LlamaConfig(**SMALL))
    share_prefixes(policy)
    shapes = []
    policy.base_model.layers[0].mlp.register_forward_hook(lambda *told: shapes.append(tuple(told[2].shape[:-1])))
    ids = torch.arange(2, 42).view(4, 10)
    policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert shapes == [(4, 10)]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8), "scores are capped"),
        (MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2), "linear_attention"),
        (BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4), "attention is eager"),
        (OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, attention_dropout=0.1), "dropout"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_in_which_it_would_not_be_exact_is_named_with_the_reason(config, reason):
    assert reason in why_not(model(config))


def test_virtual_prompt_tokens_are_a_reason_and_lora_is_none():
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert "virtual tokens" in why_not(get_peft_model(model(LlamaConfig(**SMALL)), virtual))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert why_not(get_peft_model(model(LlamaConfig(**SMALL)), lora)) is None


def test_a_window_that_a_layer_does_not_ask_for_is_found_though_the_rows_tried_are_shorter():
    policy = model(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=50))
    assert why_not(policy) is None
    layer = policy.base_model.layers[1].self_attn
    layer.config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None, attn_implementation=SHARING)
    assert why_not(policy) == "its layers do not ask for the sliding windows of its config"


def test_a_model_that_answers_otherwise_in_a_flat_row_is_found_by_trying():
    policy = model(LlamaConfig(**SMALL))
    policy.base_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: _counted(args), with_kwargs=True
    )
    assert why_not(policy) == "its hidden states differ in a flat row"


def _counted(args):
    """As a model would be that counts positions itself, whatever it is told."""
    hidden = args[0]
    return args, {"position_ids": torch.arange(hidden.shape[1])[None]}


def test_sampling_is_what_it_was():
    policy = model(LlamaConfig(**SMALL))
    ids, mask = rows(3)
    asked = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), "max_new_tokens": 8, "do_sample": False}
    before = policy.generate(**asked)
    share_prefixes(policy)
    assert torch.equal(policy.generate(**asked), before)
