"""What makes TRL's trainers faster without changing what they train; each choice is printed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from trl.trainer import utils as trl_utils

from dpo_kit.errors import ConfigError
from dpo_kit.prefix import share_prefixes, why_not
from dpo_kit.settings import Speed

log = logging.getLogger(__name__)


def speed_up(models: Sequence[PreTrainedModel], speed: Speed) -> None:
    """Apply to `models` (policy, reference) what `speed` asks for. Raises ConfigError where one of them cannot."""
    score_labelled_positions_only()
    if speed.share_prefix is False:
        log.info("padding is computed, and a pair's prompt twice: speed.share_prefix=false")
        return
    reason = next((reason for model in models if (reason := why_not(model))), None)
    if reason and speed.share_prefix is True:
        raise ConfigError(f"speed.share_prefix=true cannot be had with this model: {reason}; auto leaves it off")
    if reason:
        log.info("padding is computed, and a pair's prompt twice: %s", reason)
        return
    for model in models:
        share_prefixes(model)
    log.info("each token of a batch is computed once: no padding, a pair's prompt not twice")


def score_labelled_positions_only() -> None:
    """Let TRL's fused LM head score the labelled positions alone on CPUs, as it does on GPUs.

    Where there is no Triton it scores every position, prompt and padding too, to spare Neuron devices recompilations.
    """
    trl_utils._use_triton = _is_not_neuron


def _is_not_neuron(device: Any) -> bool:
    return device.type != "neuron"
