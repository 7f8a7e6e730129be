"""What makes TRL's trainers faster without changing what they train; each choice is printed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from dpo_kit.errors import ConfigError
from dpo_kit.hardware import has_accelerator
from dpo_kit.prefix import share_prefixes, why_not
from dpo_kit.settings import Speed

log = logging.getLogger(__name__)


def speed_up(models: Sequence[PreTrainedModel], speed: Speed, trl: dict[str, Any], *, lengths: bool = True) -> bool:
    """Apply to `models` (policy, reference) what `speed` asks for; whether batches are to hold rows of similar length,
    which needs rows whose `lengths` are known.

    Raises ConfigError where a model cannot do what is asked for.
    """
    score_labelled_positions_only()
    if not has_accelerator():
        fit_head_to_cpu()
    shared = speed.share_prefix is not False and _compute_each_token_once(models, speed)
    padded = speed.share_prefix is not False and not shared
    grouped = speed.group_by_length
    if grouped == "auto":
        grouped = lengths and padded and trl.get("train_sampling_strategy") != "sequential"
    said = "each token of a batch is computed once: no padding, a pair's prompt not twice"
    if not shared:
        said = f"padding is computed, and a pair's prompt twice{'' if padded else ': speed.share_prefix=false'}"
    log.info("%s; batches of %s", said, "similar length" if grouped else "whatever length")
    return grouped


def _compute_each_token_once(models: Sequence[PreTrainedModel], speed: Speed) -> bool:
    """Whether every one of `models` can; if so, they do."""
    reason = next((reason for model in models if (reason := why_not(model))), None)
    if reason and speed.share_prefix is True:
        raise ConfigError(f"speed.share_prefix=true cannot be had with this model: {reason}; auto leaves it off")
    if reason:
        log.info("a prompt cannot be computed once for both answers: %s", reason)
        return False
    for model in models:
        share_prefixes(model)
    return True


def score_labelled_positions_only() -> None:
    """Let TRL's fused LM head score the labelled positions alone on CPUs, as it does on GPUs.

    Where there is no Triton it scores every position, prompt and padding too, to spare Neuron devices recompilations.
    """
    trl_utils._use_triton = _is_not_neuron


def _is_not_neuron(device: Any) -> bool:
    return device.type != "neuron"


HEAD_TOKENS = 128  # at a time: their logits stay in a CPU's cache, where TRL's 4096 go through memory a dozen times


def fit_head_to_cpu() -> None:
    """Let TRL's fused LM head work on small tiles, and multiply what is bf16 already without widening it first."""
    chunked_logprob.TOKEN_CHUNK_SIZE = HEAD_TOKENS
    chunked_logprob._addmm_fp32 = _add_product  # type: ignore[assignment]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` with an fp32 `total`: the products of bf16 numbers are exact in fp32, so that a kernel
    that takes the factors as bf16 gives the same sum in half the time.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if left.dtype == right.dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        total.addmm_(left.float(), right.float())
    finally:
        matmul.fp32_precision = before
