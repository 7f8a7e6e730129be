"""The preview: mixing policy and reference as DeRa does, against plain full forward passes and enumeration."""

import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LogitsProcessor

from dpo_kit.callbacks.drift import Drift
from dpo_kit.callbacks.preview import Mixed, Preview
from dpo_kit.callbacks.reference import Reference
from dpo_kit.model.batches import measuring
from tests import oracle, tiny

PROMPTS = [{"prompt": "red", "prompt_id": "a"}, {"prompt": "blue two cat", "prompt_id": "b"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["full", "lora"])
def drift(request: pytest.FixtureRequest, folder: str, tmp_path: Any) -> Drift:
    """A policy that has moved away from its reference."""
    options = {"peft_config": tiny.LORA} if request.param == "lora" else {"ref_model": tiny.model()}
    trainer = tiny.trainer("dpo", folder, tmp_path, **options)
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if request.param == "full" or "lora_B" in name:
            weight.data += 0.3 * torch.randn_like(weight)
    options = {"max_new_tokens": 6, "batch_size": 64, "cache_bytes": 0}
    return Drift(Reference(trainer), PROMPTS * 16, **options)


class Recorded(LogitsProcessor):
    """Keeps what a processor made of each step's logits."""

    def __init__(self, inner: LogitsProcessor, seen: list[tuple[Tensor, Tensor]]) -> None:
        self.inner, self.seen = inner, seen

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mixed = self.inner(input_ids, scores)
        self.seen.append((input_ids, mixed))
        return mixed


def plain_mix(drift: Drift, ids: list[int], share: float) -> Tensor:
    """Log-probabilities of the next token from full forward passes, without padding or cache."""
    inputs = torch.tensor([ids])
    with drift.reference.active() as model:
        reference = model(inputs).logits[0, -1].log_softmax(-1)
    policy = drift.policy(inputs).logits[0, -1].log_softmax(-1)
    return ((1 - share) * reference + share * policy).log_softmax(-1)


def test_mixed_logits_equal_those_of_full_forward_passes_at_every_step(drift: Drift) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    with measuring(drift.reference.trainer):
        drift.draw(drift.policy, lambda mask: Recorded(Mixed(drift.reference, mask, 0.3), seen))
        assert len(seen) >= 3
        for ids, mixed in seen:
            going_on = [(row, tokens) for row, tokens in enumerate(ids.tolist()) if 1 not in tokens]
            for row, tokens in going_on[::7]:
                tokens = tokens[next(place for place, token in enumerate(tokens) if token) :]  # pads stand to the left
                expected = plain_mix(drift, tokens, 0.3)
                assert torch.allclose(mixed[row].log_softmax(-1), expected, atol=1e-4)


def test_the_whole_policy_gives_its_own_samples_and_none_of_it_gives_the_reference(drift: Drift) -> None:
    with measuring(drift.reference.trainer):
        own = drift.draw(drift.policy)
        mixed = drift.draw(drift.policy, lambda mask: Mixed(drift.reference, mask, 1.0))
        assert [s.token_ids for s in mixed] == [s.token_ids for s in own]
        with drift.reference.active() as model:
            start = drift.draw(model)
        none = drift.draw(drift.policy, lambda mask: Mixed(drift.reference, mask, 0.0))
        assert [s.token_ids for s in none] == [s.token_ids for s in start]
        nothing = drift.reverse(none, 0.0).rb
        assert nothing is not None and float(nothing.abs().max()) < 1e-5
        full, plain = drift.reverse(own, 1.0).rb, drift.reverse(own).rb
        assert full is not None and plain is not None and torch.equal(full, plain)


def test_kl_of_a_mix_agrees_with_enumeration(tmp_path: Any) -> None:
    policy, start = (tiny.model(oracle.VOCABULARY, seed=seed, scale=0.5) for seed in (3, 4))
    words = tiny.tokenizer(["red", "blue", "cat"])

    class Mix(torch.nn.Module):
        def forward(self, ids: Tensor) -> Any:
            logits = torch.lerp(start(ids).logits, policy(ids).logits, 0.4)
            return type("Output", (), {"logits": logits})

    trainer = type("Trainer", (), {})()
    trainer.model, trainer.processing_class, trainer.ref_model = policy, words, start
    trainer.args = type("Args", (), {"sync_ref_model": False})
    trainer.accelerator = Accelerator(cpu=True)
    row = {"prompt": "red blue", "prompt_id": "a"}
    options = {"max_new_tokens": oracle.LIMIT, "batch_size": 512, "cache_bytes": 0}
    drift = Drift(Reference(trainer), [row] * 2000, **options)
    with measuring(trainer, start):
        samples = drift.draw(policy, lambda mask: Mixed(drift.reference, mask, 0.4))
        kl = drift.reverse(samples, 0.4).rb
    assert kl is not None
    exact = oracle.exact_kl(Mix(), start, words("red blue")["input_ids"])
    assert abs(float(kl.mean()) - exact) < 4 * float(kl.std()) / len(kl) ** 0.5
    assert exact > 0.01


def test_only_larger_betas_are_predicted_and_more_of_it_drifts_less(drift: Drift, tmp_path: Any) -> None:
    path = tmp_path / "preview.json"
    preview = Preview(drift, 0.1, [0.05, 0.1, 0.2, 0.5], path, lambda samples: {"gold/reward": float(len(samples))})
    preview.on_train_end(None, None, None)
    written = json.loads(path.read_text())
    assert written["from_beta"] == 0.1 and [point["beta"] for point in written["points"]] == [0.2, 0.5]
    near, far = (point["probe/kl_reverse_rb_nats"] for point in reversed(written["points"]))
    with measuring(drift.reference.trainer):
        own = drift.reverse(drift.draw(drift.policy)).rb
    assert own is not None and 0 < near < far < float(own.mean())
    assert written["points"][0]["gold/reward"] == 32
