"""Scoring, sampling and the reference, against plain forward passes and enumeration."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    RecurrentGemmaConfig,
)

from dpo_kit.callbacks.drift import Drift, drift_metrics, kl_terms
from dpo_kit.callbacks.probe import PairProbe, name_rows
from dpo_kit.callbacks.reference import Reference
from dpo_kit.errors import DataError, ModelError
from dpo_kit.model import head, predicted
from dpo_kit.model.batches import measuring
from dpo_kit.model.head import read_head
from dpo_kit.model.predicted import Predicted, predict, token_logps
from dpo_kit.model.sampling import Draw, Shaped, draw_samples
from dpo_kit.model.scoring import length_sorted_batches, score, twin_batches
from dpo_kit.trainer.reference_store import score_as_trained
from tests import oracle, tiny

HEAD = {"vocab_size": 14, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 1.0, "pad_token_id": 0}  # fmt: skip
SEQUENCES = [([2, 3, 4], [5, 1]), ([2], [6, 7, 8, 9, 1]), ([5, 6, 7, 8, 9, 10], [1]), ([3, 3], [4, 4, 4, 1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def dpo(folder: str, tmp_path: Path) -> Any:
    return tiny.trainer("dpo", folder, tmp_path)


def plain_logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Summed log-probability by a forward pass of one sequence, without padding, in float64."""
    with torch.no_grad():
        rows = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(float(rows[len(prompt) - 1 + index, token]) for index, token in enumerate(completion))


@pytest.mark.parametrize("tokens_per_batch", [1, 10, 1000])
def test_scores_are_plain_forward_log_probabilities(tokens_per_batch: int) -> None:
    model = tiny.model().eval()
    expected = [plain_logp(model, prompt, completion) for prompt, completion in SEQUENCES]
    with torch.no_grad():
        assert score(model, SEQUENCES, pad_id=0, tokens_per_batch=tokens_per_batch).tolist() == pytest.approx(
            expected, abs=1e-5
        )


def test_only_completion_positions_pass_the_head_and_capped_logits_stay_capped() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=14, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=1.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape))
    with torch.no_grad():
        predicted = predict(model, SEQUENCES, pad_id=0)
        logits = predicted.logits(slice(None))
        assert seen[-1] == (1, 16) and predicted.states.shape == (12, 16) and logits.shape == (12, 14)
        assert 0.4 < float(logits.abs().max()) <= 0.5
        expected = [plain_logp(model, *each) for each in SEQUENCES]
        assert score(model, SEQUENCES, pad_id=0).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_completion_token_that_nothing_precedes_is_left_out_as_in_trl() -> None:
    model = tiny.model().eval()
    with torch.no_grad():
        assert score(model, [([], [5, 6, 1])], pad_id=0).item() == pytest.approx(
            plain_logp(model, [5], [6, 1]), abs=1e-5
        )


def test_batches_hold_every_sequence_once_within_the_token_limit() -> None:
    sequences = [([2] * (1 + index % 7), [3] * (index % 11)) for index in range(50)]
    batches = length_sorted_batches(sequences, 40)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    longest = [max(len(sequences[i][0]) + len(sequences[i][1]) for i in batch) for batch in batches]
    assert all(len(batch) * length <= 40 for batch, length in zip(batches, longest, strict=True))
    assert longest == sorted(longest, reverse=True)


def test_two_answers_to_a_prompt_stand_half_a_batch_apart_and_no_sequence_is_lost() -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(9)] * draw.randint(1, 6) for _ in range(12)]
    sequences = [(draw.choice(prompts), [3] * draw.randint(1, 9)) for _ in range(61)]
    batches = twin_batches(sequences, 60)
    assert sorted(index for batch in batches for index in batch) == list(range(61))
    twins = [batch for batch in batches if sequences[batch[0]][0] == sequences[batch[len(batch) // 2]][0]]
    for batch in twins:
        half = len(batch) // 2
        assert [sequences[i][0] for i in batch[:half]] == [sequences[i][0] for i in batch[half:]]
    alone = [tuple(sequences[i][0]) for batch in batches if batch not in twins for i in batch]
    assert len(alone) == len(set(alone)) and sum(map(len, twins)) + len(alone) == 61
    assert max(len(batch) * max(sum(map(len, sequences[i])) for i in batch) for batch in batches) <= 60


@pytest.mark.parametrize("lora", [False, True])
def test_under_bf16_autocast_a_trainer_is_measured_in_the_fp32_of_its_weights(
    folder: str, tmp_path: Path, lora: bool
) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, bf16=True, peft_config=tiny.LORA if lora else None, max_steps=1)
    trainer.train()  # accelerate prepares the model, which from then on computes under autocast by itself
    clean = copy.deepcopy(trainer.model).eval()
    vars(clean)["forward"] = vars(clean)["_original_forward"].__func__.__get__(clean)
    expected = [plain_logp(clean, *each) for each in SEQUENCES]
    prepared = trainer.model.forward
    with measuring(trainer):
        exact = score(trainer.model, SEQUENCES, pad_id=0)
    assert trainer.model.forward == prepared
    assert exact.tolist() == pytest.approx(expected, abs=1e-5)
    head._HEADS.clear()
    with measuring(trainer, as_trained=True):
        rounded = score_as_trained(trainer, trainer.model, SEQUENCES)
        assert read_head(trainer.model) is not None  # found plain though the trainer computes in bf16
    assert rounded.tolist() == pytest.approx(expected, abs=0.2) and rounded.tolist() != pytest.approx(
        expected, abs=1e-3
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_the_reference_pass_reads_what_trl_s_loss_reads(folder: str, tmp_path: Path, bf16: bool) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, bf16=bf16)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    ours = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids")
            for row in trainer.train_dataset.select(range(4))]  # fmt: skip
    theirs = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    with measuring(trainer, as_trained=True):
        found = score_as_trained(trainer, trainer.model, ours)
    assert found.tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
    with measuring(trainer):
        exact = score(trainer.model, ours, pad_id=0)
    assert (exact.tolist() == pytest.approx(theirs.tolist(), abs=1e-3)) is not bf16


def test_measuring_leaves_no_trace(folder: str, tmp_path: Path) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, peft_config=tiny.LORA)
    trainer.model.train()
    layer = trainer.model.base_model.model.model.layers[0].eval()  # a part that its owner froze
    layer.self_attn.q_proj.lora_A.default.weight.requires_grad_(False)  # PEFT would thaw it
    before = [module.training for module in trainer.model.modules()]
    needed = [parameter.requires_grad for parameter in trainer.model.parameters()]
    state = torch.random.get_rng_state()
    reference = Reference(trainer)
    with measuring(trainer), reference.active() as model:
        assert not any(module.training for module in trainer.model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
        score(model, SEQUENCES, pad_id=0)
    assert [module.training for module in trainer.model.modules()] == before
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == needed
    assert torch.equal(torch.random.get_rng_state(), state)


HOSTILE = {
    "repetition_penalty": 5.0,
    "temperature": 0.2,
    "top_k": 1,
    "top_p": 0.1,
    "min_length": 30,
    "min_new_tokens": 6,
    "suppress_tokens": [2, 3, 4],
    "begin_suppress_tokens": [5, 6],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "bad_words_ids": [[11]],
    "sequence_bias": [[[12], -50.0]],
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_length": 4,
    "use_cache": False,
    "return_dict_in_generate": True,
    "output_scores": True,
    "exponential_decay_length_penalty": [1, 2.0],
}


@pytest.mark.parametrize("lora", [False, True])
def test_a_hostile_generation_config_gives_the_same_samples_as_a_clean_one(
    folder: str, tmp_path: Path, lora: bool
) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, peft_config=tiny.LORA if lora else None)
    base = trainer.model.get_base_model() if lora else trainer.model
    drawn = []
    for config in (GenerationConfig(), GenerationConfig(**HOSTILE)):
        base.generation_config = config
        with measuring(trainer, seed=3):
            drawn.append(draw_samples(trainer.model, tiny.tokenizer(), tiny.pairs(20), max_new_tokens=8))
        assert base.generation_config is config
    assert drawn[0] == drawn[1]
    lengths = {len(each.token_ids) for each in drawn[0]}
    assert len(lengths) > 2 and len({tuple(each.token_ids) for each in drawn[0]}) > 10


def test_tokens_are_drawn_as_torch_draws_them_row_by_row() -> None:
    scores = torch.randn(7, 50)
    torch.manual_seed(5)
    expected = [torch.multinomial(scores.softmax(-1), 1)[:, 0] for _ in range(3)]
    for rows in (list(range(7)), [4, 1]):
        torch.manual_seed(5)
        draw = Draw(rows, 7)
        assert all(torch.equal(draw(None, scores[rows]).argmax(-1), each[rows]) for each in expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.3},
        {"do_sample": True, "min_p": 0.2, "top_k": 0},
        {"do_sample": True},
        {"do_sample": False, "repetition_penalty": 1.5},
    ],
)
def test_logits_are_shaped_as_generate_shapes_them_by_the_model_s_own_config(options) -> None:
    model, config = tiny.model(80, scale=1.0).eval(), GenerationConfig(**options, max_new_tokens=1, pad_token_id=0)
    ids = torch.tensor([[4, 5, 4, 6], [9, 2, 3, 3]])
    theirs = model.generate(ids, generation_config=config, output_scores=True, return_dict_in_generate=True)
    with torch.no_grad():
        ours = Shaped(config)(ids, model(ids).logits[:, -1])
    if config.do_sample:
        assert torch.equal(ours.softmax(-1) > 0, theirs.scores[0].softmax(-1) > 0)
        assert torch.allclose(ours.softmax(-1), theirs.scores[0].softmax(-1), atol=1e-6)
    else:
        assert ours.argmax(-1).tolist() == theirs.sequences[:, -1].tolist()


def test_samples_follow_the_models_own_distribution() -> None:
    """Shares of first tokens and of cut samples against exact probabilities, within 4 standard errors."""
    model, tokenizer = tiny.model(oracle.VOCABULARY, scale=0.6).eval(), tiny.tokenizer(["a", "b", "c"])
    rows, prompt = [{"prompt": "a b"}] * 2000, tokenizer("a b")["input_ids"]
    torch.manual_seed(0)
    with torch.no_grad():
        samples = draw_samples(model, tokenizer, rows, max_new_tokens=oracle.LIMIT, batch_size=1000)
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    for token in range(oracle.VOCABULARY):
        share = sum(each.token_ids[0] == token for each in samples) / len(samples)
        assert abs(share - first[token]) < 4 * (first[token] * (1 - first[token]) / len(samples)) ** 0.5 + 1e-3
    cut, exact = sum(each.cut for each in samples) / len(samples), oracle.cut_probability(model, prompt)
    assert abs(cut - exact) < 4 * (exact * (1 - exact) / len(samples)) ** 0.5 + 1e-3
    assert all(each.cut == (each.token_ids[-1] != oracle.EOS) for each in samples)


def oracle_trainer(p: Any) -> Any:
    """The few parts of a trainer that measuring reads, around a model of five tokens."""
    from accelerate import Accelerator

    parts = {
        "model": p,
        "processing_class": tiny.tokenizer(["a", "b", "c"]),
        "accelerator": Accelerator(cpu=True),
    }
    return type("Parts", (), parts | {"args": type("Arguments", (), {"max_length": None})})()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_measured_kl_agrees_with_enumeration_within_its_standard_errors(direction: str) -> None:
    policy, start = (tiny.model(oracle.VOCABULARY, seed=seed, scale=0.4).eval() for seed in (0, 1))
    trainer = oracle_trainer(policy)
    rows = name_rows([{"prompt": "a b", "prompt_id": str(index)} for index in range(1500)])
    reference = Reference(trainer, model=start, is_start=False)
    drift = Drift(reference, rows, max_new_tokens=oracle.LIMIT, batch_size=1500, cache_bytes=2**24)
    with measuring(trainer, start):
        prepared = drift.prepare(0)
        samples = prepared.samples if direction == "forward" else drift.draw(policy)
        found = drift.forward(prepared) if direction == "forward" else drift.reverse(samples)
    values = drift_metrics(direction, found, samples)
    p, q = (start, policy) if direction == "forward" else (policy, start)
    exact, prompt = oracle.exact_kl(p, q, [2, 3]), f"probe/kl_{direction}"
    for estimator in ("rb", "k1"):
        error = values[f"{prompt}_{estimator}_nats_se"]
        assert abs(values[f"{prompt}_{estimator}_nats"] - exact) < 4 * error
        assert 0 < error < exact
    tokens = sum(len(each.token_ids) for each in samples) / len(samples)
    assert values[f"{prompt}_rb_nats_per_token"] == pytest.approx(values[f"{prompt}_rb_nats"] / tokens)
    assert values[f"{prompt}_rb_nats_cut_share"] == pytest.approx(oracle.cut_probability(p, [2, 3]), abs=0.05)


def test_kl_terms_are_summed_in_tiles_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    p, q, targets = torch.randn(23, 9), torch.randn(23, 9), torch.randint(9, (23,))
    given = Predicted(p, None), Predicted(q, None), targets
    whole = kl_terms(*given)
    monkeypatch.setitem(predicted.TILE_BYTES, "cpu", 5 * 4 * 9)
    assert [(rows.start, rows.stop) for rows in given[0].tiles()] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 25)]
    tiled = kl_terms(*given)
    logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (logp.exp() * (logp - logq)).sum(-1)
    for terms in (whole, tiled):
        assert terms["rb"].tolist() == pytest.approx(exact.tolist(), abs=1e-5)
        assert terms["k1"].tolist() == pytest.approx((logp - logq)[range(23), targets].tolist(), abs=1e-5)
    assert token_logps(given[0], targets).tolist() == pytest.approx(logp[range(23), targets].tolist(), abs=1e-5)


def test_a_kl_far_below_the_rounding_of_log_probabilities_is_measured() -> None:
    torch.manual_seed(0)
    p = 8 * torch.randn(50, 4000)
    q = p + 1e-4 * torch.randn(50, 4000)
    logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (logp.exp() * (logp - logq)).sum(-1)
    assert 1e-10 < float(exact.mean()) < 1e-8  # the plain sum in fp32 is off by 1e-7
    rb = kl_terms(Predicted(p, None), Predicted(q, None), torch.zeros(50, dtype=torch.long))["rb"]
    assert float((rb - exact).abs().mean()) < 0.05 * float(exact.mean())


HEADS = [
    LlamaConfig(**HEAD),
    Gemma2Config(**HEAD, head_dim=8, final_logit_softcapping=0.5),
    CohereConfig(**HEAD, logit_scale=0.3, eos_token_id=1, bos_token_id=2),
    GraniteConfig(**HEAD, logits_scaling=4.0),
    FalconH1Config(**HEAD, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4),
    RecurrentGemmaConfig(**HEAD, lru_width=16, logits_soft_cap=0.4, attention_window_size=8),
]


@torch.no_grad()
@pytest.mark.parametrize("config", HEADS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_scaled_and_capped_as_the_model_does_and_in_fp32(config: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    expected = model.float()(torch.tensor([[2, 3, 4, 5, 1]])).logits[0, 2:4]
    model.to(dtype)
    predicted = predict(model, SEQUENCES[:1], pad_id=0)
    logits = predicted.logits(slice(None))
    assert logits.dtype == torch.float32 and predicted.head is not None
    assert float((logits - expected).abs().max() / expected.abs().max()) < (1e-5 if dtype == torch.float32 else 3e-2)


@torch.no_grad()
def test_logits_that_are_not_the_head_alone_are_asked_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**HEAD, lru_width=16, attention_window_size=8)).eval()
    monkeypatch.setattr(model.config, "logits_soft_cap", 0.4)
    expected = model(torch.tensor([[2, 3, 4, 5, 1]])).logits[0, 2:4]
    monkeypatch.setattr(head, "CAPS", head.CAPS[:1])  # a cap under a name that nobody knows
    predicted = predict(model, SEQUENCES[:1], pad_id=0)
    assert predicted.head is None
    assert torch.allclose(predicted.logits(slice(None)), expected, atol=1e-5)


def test_a_head_with_an_adapter_on_it_is_asked_through_the_model() -> None:
    lora = get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    lora.get_output_embeddings().lora_B.default.weight.data.fill_(0.5)
    with torch.no_grad():
        expected = [plain_logp(lora.eval(), *each) for each in SEQUENCES]
        assert read_head(lora) is None
        assert score(lora, SEQUENCES, pad_id=0).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.fault("another model as the reference of the probe", promise="P7")
def test_a_wrong_reference_is_refused_and_named(dpo: Any) -> None:
    probe = PairProbe(dpo, tiny.pairs(4), reference=Reference(dpo, model=tiny.model(seed=5)))
    with pytest.raises(ModelError, match=r"1e-3 nats a sequence.*differ by up to .* nats.*pass ref_model"):
        probe.scores()


def test_trl_loads_another_reference_than_an_edited_policy_and_the_identity_check_sees_it(
    folder: str, tmp_path: Path
) -> None:
    """The upstream fault is still there: `ref_model=None` reads the path, not the weights in memory."""
    edited = tiny.LlamaForCausalLM.from_pretrained(folder)
    edited.lm_head.weight.data *= 1.5
    with pytest.raises(ModelError, match="edited"):
        PairProbe(tiny.trainer("dpo", folder, tmp_path, model=edited), tiny.pairs(4)).scores()


@pytest.mark.fault("a policy of NaN weights at step 0", promise="P7")
def test_a_policy_of_nans_does_not_pass_the_identity_check(dpo: Any) -> None:
    dpo.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError):
        PairProbe(dpo, tiny.pairs(4)).scores()


def test_another_reference_given_on_purpose_is_measured_from(dpo: Any) -> None:
    other = tiny.model(seed=5).eval()
    probe = PairProbe(dpo, tiny.pairs(4), reference=Reference(dpo, model=other, is_start=False))
    scores = probe.scores()
    for index, (prompt, completion) in enumerate(probe._sequences[:4]):
        expected = plain_logp(dpo.model.eval(), prompt, completion) - plain_logp(other, prompt, completion)
        assert float(scores.logratio_chosen[index]) == pytest.approx(expected, abs=1e-4)
    largest = max(scores.logratio_chosen.abs().max(), scores.logratio_rejected.abs().max())
    assert probe.reference_offset_nats == pytest.approx(float(largest))


def test_rows_whose_prompt_leaves_no_room_are_left_out(folder: str, tmp_path: Path) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, max_length=4)
    rows = [{"prompt": "red", "chosen": " cat", "rejected": " dog"}]
    full = [{"prompt": "red red red red", "chosen": " cat", "rejected": " dog"}]
    probe = PairProbe(trainer, full + rows)
    assert [row["pair_id"] for row in probe.rows] == ["1"]
    assert probe._sequences == [([2], [8, 1]), ([2], [9, 1])]
    with pytest.raises(DataError, match="max_length"):
        PairProbe(trainer, full)


def test_unary_rows_need_both_labels(dpo: Any) -> None:
    with pytest.raises(DataError, match="both labels"):
        PairProbe(dpo, [row for row in tiny.unary(8) if row["label"]])


def test_probe_file_holds_every_pair_of_every_scoring_in_strict_json(dpo: Any, tmp_path: Path) -> None:
    rows, path = tiny.pairs(5), tmp_path / "probe.jsonl"
    probe = PairProbe(dpo, rows, path=path)
    probe.scores()
    dpo.model.lm_head.weight.data *= 1.1
    dpo.state.global_step = 7
    scores = probe.scores()
    probe.scores()  # not written twice
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in path.open()]
    assert [(line["step"], line["pair_id"]) for line in lines] == [
        (step, row["pair_id"]) for step in (0, 7) for row in rows
    ]
    assert lines[5] == {
        "step": 7,
        "pair_id": "p0",
        "prompt_id": "x0",
        "logratio_chosen_nats": float(scores.logratio_chosen[0]),
        "logratio_rejected_nats": float(scores.logratio_rejected[0]),
        "tokens_chosen": int(scores.tokens_chosen[0]),
        "tokens_rejected": int(scores.tokens_rejected[0]),
    }


def test_a_resumed_run_replaces_the_lines_after_its_checkpoint(dpo: Any, tmp_path: Path) -> None:
    path = tmp_path / "probe.jsonl"
    path.write_text("".join(f'{{"step": {step}, "pair_id": "old"}}\n' for step in (0, 2, 4)) + '{"step": 4, "pa')
    dpo.state.global_step = 4
    PairProbe(dpo, tiny.pairs(2), path=path).scores()
    assert [(line["step"], line["pair_id"]) for line in map(json.loads, path.open())] == [
        (0, "old"), (2, "old"), (4, "p0"), (4, "p1")
    ]  # fmt: skip


def test_what_rounding_does_to_the_reference_itself_is_measured_and_kept_where_weights_are_bf16(tmp_path: Path) -> None:
    rows, found = name_rows(tiny.pairs(12)), {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = oracle_trainer(tiny.model().to(dtype).eval())
        trainer.processing_class, trainer.state = tiny.tokenizer(), type("State", (), {"global_step": 0})()
        trainer.is_world_process_zero = lambda: True
        reference = Reference(trainer, state_dir=tmp_path / str(dtype))
        probe = PairProbe(trainer, rows, reference=reference)
        probe.scores()
        drift = Drift(reference, rows, max_new_tokens=8, batch_size=12, cache_bytes=2**24)
        with measuring(trainer):
            found[dtype] = probe.floor_nats, drift.prepare(0).floor_nats
        kept = reference.load("samples", drift._fingerprint)
        assert kept is not None and kept["floor_nats"] == found[dtype][1]
    assert found[torch.float32] == (0, 0)
    assert 1e-4 < found[torch.bfloat16][0] < 0.1 and 0 < found[torch.bfloat16][1] < 1e-2
