"""What makes TRL's trainers faster without changing what they train; each choice is printed."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from dpo_kit.config.settings import Speed
from dpo_kit.errors import ConfigError
from dpo_kit.model.batches import bare
from dpo_kit.model.hardware import has_accelerator

log = logging.getLogger(__name__)
SHARING = "dpo_kit_shared_prefix"  # the name of prefix.py's attention among transformers' own


def speed_up(models: Sequence[PreTrainedModel], speed: Speed, trl: dict[str, Any], *, lengths: bool = True) -> bool:
    """Apply to `models` (policy, reference) what `speed` asks for; whether batches are to hold rows of similar length,
    which needs rows whose `lengths` are known.

    Raises ConfigError where a model cannot do what is asked for.
    """
    score_labelled_positions_only()
    for model in models:
        count_weights_once(model)
    if not has_accelerator():
        fit_head_to_cpu()
    else:
        from dpo_kit.trainer.on_gpu import fuse_norms

        if {fuse_norms(model) for model in models} == {True}:
            log.info("each RMSNorm is one kernel")
    padded, said = False, "padding is computed, and a pair's prompt twice: speed.share_prefix=false"
    if speed.share_prefix is not False:
        from dpo_kit.trainer.prefix import share_prefixes, why_not

        said = "each token of a batch is computed once: no padding, a pair's prompt not twice"
        if reason := next((reason for model in models if (reason := why_not(model))), None):
            if speed.share_prefix is True:
                raise ConfigError(
                    f"speed.share_prefix=true cannot be had with this model: {reason}; auto leaves it off"
                )
            log.info("a prompt cannot be computed once for both answers: %s", reason)
            padded, said = True, "padding is computed, and a pair's prompt twice"
        for model in models if not padded else ():
            share_prefixes(model)
    grouped = speed.group_by_length
    if grouped == "auto":
        grouped = lengths and padded and trl.get("train_sampling_strategy") != "sequential"
    log.info("%s; batches of %s", said, "similar length" if grouped else "whatever length")
    return grouped


def shares_prefixes(model: Any) -> bool:
    """Whether each token of a batch is computed once in `model`."""
    return bare(model).config._attn_implementation == SHARING


def score_labelled_positions_only() -> None:
    """Let TRL's fused LM head score the labelled positions alone on CPUs, as it does on GPUs.

    Where there is no Triton it scores every position, prompt and padding too, to spare Neuron devices recompilations.
    """
    trl_utils._use_triton = lambda device: device.type != "neuron"


def count_weights_once(model: Any) -> None:
    """Let transformers, which counts a model's weights anew at every batch for `total_flos`, remember their number."""
    bare(model).num_parameters = functools.cache(bare(model).num_parameters)


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
