"""Padded batches, how wide a model is, and the state in which it is measured: no gradients, no trace in training."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer


@contextmanager
def measuring(trainer: Trainer, *models: Any, seed: int = 0, as_trained: bool = False) -> Iterator[None]:
    """Measure with the trainer's models and leave no trace in its training.

    Inside: no gradients, no dropout, a forked random state seeded with `seed`, and the precision of the weights, which
    a small drift needs (bf16 autocast moves an answer by half a nat) or, `as_trained`, the trainer's own autocast,
    which its loss reads. After: random state, each module's mode and each parameter's `requires_grad` are as before.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        for model in (trainer.model, *models):
            stack.enter_context(_evaluation_mode(model))
            if not as_trained:
                stack.enter_context(without_autocast(model))
        if as_trained:
            stack.enter_context(trainer.accelerator.autocast())
        torch.manual_seed(seed)
        yield


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """Inside, `model` computes in the precision of its weights."""
    # A model that accelerate has prepared computes under autocast whatever surrounds the call: its `forward` was
    # replaced (Accelerator.prepare_model), and the one before is kept beside
    prepared = vars(model).get("forward")
    if (original := vars(model).get("_original_forward")) is not None:
        model.forward = original
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if original is not None:
            model.forward = prepared


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required in gradients:
            parameter.requires_grad_(required)


def random_states() -> dict[str, Any]:
    """The state of every generator that training draws from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's, else EOS, else 0 (padding is masked, so any id does)."""
    return next(each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if each is not None)


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device, side: str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of sequences padded on one `side` ("left" or "right"), both (rows, longest)."""
    rows = [torch.tensor(each, dtype=torch.long) for each in sequences]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def mlp_width(text: Any) -> int:
    """Of the widest MLP of a model with the config `text`."""
    given = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return max(given) if isinstance(given, list | tuple) else given


def bare(model: Any) -> Any:
    """The model below an adapter, or `model` itself."""
    return model.get_base_model() if is_peft_model(model) else model
