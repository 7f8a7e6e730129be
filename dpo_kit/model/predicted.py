"""What a model predicts at the completion tokens of a batch, of which logits are made tile by tile in fp32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kit.model.head import Head, Tokens, read_head, run_to_head

TILE_BYTES = {"cpu": 2**24, "cuda": 2**29}  # of fp32 logits at once: what stays in a CPU's cache, what keeps a GPU busy


@dataclass(frozen=True)
class Predicted:
    """What a model predicts at each of n completion tokens: hidden states (n, width), of which `head` makes logits; or
    the logits themselves (n, vocabulary), where the head works in the model only (weights shared out, an adapter on
    it).
    """

    states: Tensor
    head: Head | None

    def logits(self, rows: slice) -> Tensor:
        """Of some of the tokens: (tokens, vocabulary), fp32."""
        states = self.states[rows]
        return self.head.logits(states) if self.head else states.float()

    def tiles(self) -> Iterator[slice]:
        """Tokens whose logits are made at once."""
        vocabulary = len(self.head.weight) if self.head else self.states.shape[1]
        step = max(1, TILE_BYTES[self.states.device.type] // (4 * vocabulary))
        return (slice(start, start + step) for start in range(0, len(self.states), step))


@dataclass(frozen=True)
class Mixed:
    """Logits (1 − share)·first + share·second (DeRa, arXiv:2402.02992)."""

    first: Predicted
    second: Predicted
    share: float

    def logits(self, rows: slice) -> Tensor:
        return torch.lerp(self.first.logits(rows), self.second.logits(rows), self.share)

    def tiles(self) -> Iterator[slice]:
        return self.second.tiles()


def predict(model: Any, batch: Sequence[Tokens], pad_id: int) -> Predicted:
    """What `model` predicts at each completion token, rows one after the other.

    A completion token without any token before it (empty prompt, no BOS) has no prediction and is left out, as in TRL.
    """
    head = read_head(model)
    states, logits = run_to_head(model, batch, pad_id, keep_all=head is None)
    return Predicted(states, head) if head else Predicted(logits, None)


@contextmanager
def jittered(model: Any) -> Iterator[None]:
    """Inside, the embedding of each token is off by half of its last bit, up or down at random: all that is rounded
    after it falls otherwise too, as it does when a step has moved the weights.
    """

    def move(_: Any, args: Any, states: Tensor) -> Tensor:
        signs = torch.randint(0, 2, states.shape, generator=draw).to(states) * 2 - 1
        return states * (1 + torch.finfo(model.dtype).eps / 2 * signs)

    draw = torch.Generator().manual_seed(0)
    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def completion_targets(batch: Sequence[Tokens]) -> tuple[Tensor, list[int]]:
    """The tokens that `predict` predicts, in its order, and how many belong to each row."""
    rows = [completion if prompt else completion[1:] for prompt, completion in batch]
    return torch.tensor([token for row in rows for token in row], dtype=torch.long), [len(row) for row in rows]


def token_logps(predicted: Predicted, targets: Tensor) -> Tensor:
    """Log-probability of each target: (tokens,), nats, fp32, on the CPU."""
    targets = targets.to(predicted.states.device)
    parts = [torch.zeros(0, device=targets.device)]
    for rows in predicted.tiles():
        logits = predicted.logits(rows)
        parts.append(logits.gather(-1, targets[rows][:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts).cpu()
