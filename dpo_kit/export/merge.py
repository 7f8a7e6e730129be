"""The tuned policy as one plain model: adapters merged into their base, compared with what the run left.

Merging is done in float32, where it changes nothing but the order of sums. Then the weights are rounded to the dtype of
the export: the files must hold just these, and what rounding costs is measured on answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from dpo_kit.run.history import read_metrics

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")
NOISE = 1e-4  # of the largest logit: what rounding in float32 makes of sums in another order
SAMPLES = 16
PROMPTS = (
    "Hello, how are you?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.\n\nExplain it.",
    "Schreibe einen kurzen Brief an eine Freundin, die umgezogen ist.",
    "1, 1, 2, 3, 5, 8,",
    "What is the capital of 日本? 🙂",
)
"""Texts of several kinds, for runs that have drawn no answers."""
Text = tuple[list[int], int]
"""Token ids, and the place of the first one that counts."""


@dataclass(frozen=True)
class Distance:
    """How far two models are apart on texts: logits, relative to the largest; KL in nats per token; greedy tokens."""

    logits: float
    kl: float
    greedy: float  # share of positions with the same most probable token

    def describe(self) -> str:
        same = f"the same most probable token at {self.greedy:.1%} of positions"
        return f"KL {self.kl:.1e} nats a token, {same}, logits within {self.logits:.1e} of the largest"


def read_texts(run: RunDirectory, tokenizer: Any) -> list[Text]:
    """The answers that the policy gave at the end of `run`; where it drew none, what PROMPTS have behind the beginning
    that the chat template gives all of them.
    """
    samples = read_metrics(run.samples) if run.samples.exists() else []
    texts = []
    for row in [row for row in samples if row["step"] == samples[-1]["step"]][:SAMPLES]:
        prompt = encode(tokenizer, row["prompt"])
        if answer := tokenizer(row["answer"], add_special_tokens=False)["input_ids"]:
            texts.append(([*prompt, *answer], len(prompt)))
    if texts:
        return texts
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    same = next(place for place, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    return [(ids, max(1, same)) for ids in prompts]


def merge(model: Model, run: RunDirectory, texts: Sequence[Text], base: str) -> tuple[PreTrainedModel, Tensor]:
    """The policy of `run` in float32 without adapters, and its logits on `texts` before: (positions, vocabulary).

    ModelError where the base is not the one that training started from, or where merging changed the logits.
    """
    if model.tuning == "full":
        policy = load_weights(model.model_copy(update={"dtype": "float32"}), str(run.model))
        return policy, text_logits(policy, texts)
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
    before = text_logits(adapted, texts)
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
    refuse_other("merging the adapter", compare(before, text_logits(merged, texts)))
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
def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round what is saved of a float32 `model` to what `dtype` can hold; it goes on computing in float32."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


@torch.no_grad()
def text_logits(model: Any, texts: Sequence[Text]) -> Tensor:
    """What `model` predicts for each token of `texts` that counts: logits, (tokens, vocabulary)."""
    parts = []
    for ids, start in texts:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        parts.append(logits[start - 1 : -1].float().cpu())
    return torch.cat(parts)


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


def refuse_other(what: str, distance: Distance) -> None:
    """ModelError where `distance`, measured in float32, is more than rounding; not a number counts as more."""
    if not distance.logits <= NOISE:
        raise ModelError(
            f"{what} changed the policy: its logits differ by {distance.logits:.2g} of the largest one, where the "
            f"order of sums explains {NOISE:g}; nothing is exported"
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
