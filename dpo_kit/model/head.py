"""A model's LM head, and the hidden states that reach it at the completions of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dpo_kit.model.batches import pad_batch, without_autocast

Tokens = tuple[list[int], list[int]]
"""Ids of a prompt and of its completion."""

AGREES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # largest difference of logits, relative
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names under which configs keep what their models multiply logits by; `logits_scaling` divides them."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names under which they keep c where logits are c · tanh(logits / c); TRL reads the first."""


@dataclass(frozen=True)
class Head:
    """An LM head: weight (vocabulary, width), bias (vocabulary,) or None, and how the model scales and caps its logits.

    Products of bf16 or fp16 numbers are added up, and given, in fp32: rounded to bf16, a logit of 20 is off by .06.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, width) → (tokens, vocabulary), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.is_cuda and hidden.dtype == self.weight.dtype != torch.float32:
                logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
            else:
                logits = linear(hidden.float(), self.weight.float())
        if self.bias is not None:
            logits = logits + self.bias.float()
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def to(self, device: torch.device) -> Head:
        return self._with(lambda tensor: tensor.to(device))

    def copy(self) -> Head:
        """On the CPU, as it is now, whatever becomes of the model."""
        return self._with(lambda tensor: tensor.detach().cpu().clone())

    def _with(self, change: Callable[[Tensor], Tensor]) -> Head:
        return replace(self, weight=change(self.weight), bias=None if self.bias is None else change(self.bias))


_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether a model's head was found to be plain


def read_head(model: Any) -> Head | None:
    """The LM head of `model`; None where logits are made of its hidden states in another way, which is tried out."""
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    given = [getattr(config, name) for name in SCALES if getattr(config, name, None) is not None]
    given += [1 / config.logits_scaling] if getattr(config, "logits_scaling", None) else []
    cap = next((getattr(config, name) for name in CAPS if getattr(config, name, None) is not None), None)
    head = Head(module.weight, module.bias, given[0] if given else 1.0, cap)
    if model not in _HEADS:
        _HEADS[model] = _is_plain(model, head)
    return head if _HEADS[model] else None


@torch.no_grad()
def _is_plain(model: Any, head: Head) -> bool:
    """Whether `head` gives the logits of `model`, tried on four tokens."""
    probe: Tokens = ([0], [1, 2, 3, 0])
    try:
        with without_autocast(model):
            expected = run_to_head(model, [probe], 0, keep_all=True)[1].float()
            logits = head.logits(run_to_head(model, [probe], 0, keep_all=False)[0])
    except Exception:  # whatever weights raise that are shared out or packed
        return False
    return bool((logits - expected).abs().max() <= AGREES.get(model.dtype, 2e-2) * expected.abs().max())


def run_to_head(model: Any, batch: Sequence[Tokens], pad_id: int, *, keep_all: bool) -> tuple[Tensor, Tensor]:
    """Hidden states before the LM head at completion tokens, and logits there, of the first only unless `keep_all`."""
    ids, attention = pad_batch([[*prompt, *completion] for prompt, completion in batch], pad_id, model.device, "right")
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(batch):
        scored[row, max(0, len(prompt) - 1) : len(prompt) + len(completion) - 1] = True
    states: list[Tensor] = []

    def keep_scored(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(args[0][:, -scored.shape[1] :][scored.to(args[0].device)])
        return (states[0] if keep_all else states[0][:1], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_scored)
    try:
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    finally:
        handle.remove()
    return states[0], logits
