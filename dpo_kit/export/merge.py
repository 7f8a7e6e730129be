"""The tuned policy as one plain model: adapters merged into their base, compared with what the run left.

Merging is done and compared in float32, where it is exact but for rounding; the dtype of the export comes after it and
is compared again, from the files themselves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from dpo_kit.config.settings import Model
from dpo_kit.errors import ModelError
from dpo_kit.model.load import load_weights
from dpo_kit.model.origin import base_of
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import hash_weights

log = logging.getLogger(__name__)
NOISE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest logit
PROMPTS = (
    "Hello, how are you?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.\n\nExplain it.",
    "Schreibe einen kurzen Brief an eine Freundin, die umgezogen ist.",
    "1, 1, 2, 3, 5, 8,",
    "What is the capital of 日本? 🙂",
)
"""Texts of several kinds, the same for every export."""


@dataclass(frozen=True)
class Distance:
    """How far two models are apart on PROMPTS: logits, relative to the largest; KL in nats per token; greedy tokens."""

    logits: float
    kl: float
    greedy: float  # share of positions with the same most probable token

    def describe(self) -> str:
        same = f"the same most probable token at {self.greedy:.1%} of positions"
        return f"logits within {self.logits:.1e} of the largest, KL {self.kl:.1e} nats a token, {same}"


def merge(model: Model, run: RunDirectory, tokenizer: Any, base: str) -> tuple[PreTrainedModel, Tensor]:
    """The policy of `run` in float32 without adapters, and its logits on PROMPTS before: (positions, vocabulary).

    ModelError where the base is not the one that training started from, or where merging changed the logits.
    """
    if model.tuning == "full":
        policy = load_weights(model.model_copy(update={"dtype": "float32"}), str(run.model))
        return policy, prompt_logits(policy, tokenizer)
    start = base_of(model)
    if base == "dequantised":  # with the rounding that its 4-bit form had in training
        weights = load_weights(start).dequantize(dtype=torch.float32)
    else:
        weights = load_weights(start.model_copy(update={"dtype": "float32", "tuning": "lora"}))
        if getattr(weights, "is_quantized", False):
            raise ModelError(
                f"model.path={start.path} is published in a quantised form, into which no adapter can be merged "
                "without rounding it away: name the original repository as model.path, or say base=dequantised"
            )
    head: Any = weights.get_output_embeddings()
    tied = head is not None and head.weight is weights.get_input_embeddings().weight
    if tied:  # merged into a shared matrix, an adapter on either would change both
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    adapted = PeftModel.from_pretrained(weights, run.model).eval()  # type: ignore[arg-type]
    before = prompt_logits(adapted, tokenizer)
    merged = adapted.merge_and_unload(safe_merge=True)
    if tied:
        head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
        alike = torch.equal(head.weight, embedding.weight)
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = alike
        if alike:
            head.weight = embedding.weight
        else:
            merged._tied_weights_keys = merged.all_tied_weights_keys = {}
            log.warning("the adapter changed one of the tied embeddings: the export holds both, untied")
    refuse_other("merging the adapter", compare(before, prompt_logits(merged, tokenizer)), "float32")
    return merged, before


def refuse_other_base(model: Model, manifest: dict[str, Any]) -> None:
    """ModelError where the weights at `model.path`, or the base of the adapter there, have changed since the run."""
    if model.tuning == "full":
        return
    base = base_of(model).path
    recorded = manifest["model"].get("adapter", {}).get("base_sha256") or manifest["model"]["sha256"]
    if recorded and hash_weights(base) != recorded:
        raise ModelError(
            f"{base} does not hold the weights that the adapter was trained on (sha256 "
            f"{recorded[:12]}… then): bring them back, or train again on what is there now"
        )


@torch.no_grad()
def prompt_logits(model: Any, tokenizer: Any) -> Tensor:
    """Logits at every position of PROMPTS, in the tokenizer's chat form where it has one: (positions, vocabulary)."""
    batches = (torch.tensor([encode(tokenizer, prompt)], device=model.device) for prompt in PROMPTS)
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in batches])


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of `prompt` as a user's message, or as plain text where there is no chat template."""
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def compare(one: Tensor, other: Tensor) -> Distance:
    """How far `other` is from `one`: KL(one‖other), logits; shapes (positions, vocabulary) twice."""
    logp, logq = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return Distance(
        logits=float((one - other).abs().max() / one.abs().max()),
        kl=max(0.0, float((logp.exp() * (logp - logq)).sum(-1).mean())),
        greedy=float((one.argmax(-1) == other.argmax(-1)).float().mean()),
    )


def refuse_other(what: str, distance: Distance, dtype: str) -> None:
    """ModelError where `distance` is more than rounding in `dtype` explains; not a number counts as more."""
    if not distance.logits <= NOISE[dtype]:
        raise ModelError(
            f"{what} changed the policy: its logits differ by {distance.logits:.2g} of the largest one, where "
            f"{dtype} explains {NOISE[dtype]:g}; nothing is exported"
        )


def choose_dtype(model: Model, run: RunDirectory, asked: str) -> str:
    """`asked`, or for auto the dtype of what training left: of model/, or of the base that an adapter belongs to."""
    if asked != "auto":
        return asked
    if model.tuning == "full":
        dtype = AutoConfig.from_pretrained(run.model).dtype
    else:
        base = base_of(model)
        dtype = AutoConfig.from_pretrained(base.path, revision=base.revision or "main").dtype
    return str(dtype or torch.float32).removeprefix("torch.")
