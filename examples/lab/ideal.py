"""The best that any policy can do on the lab at a given distance from the tiny model: what a frontier is compared with.

From many samples of the model to each held-out prompt, whose gold rewards are known:

    ideal       π_ref·exp(reward/λ)/Z, the optimum of reward − λ·KL (DPO, arXiv:2305.18290, eq. 4), by importance
                weights; its KL is E[reward]/λ − log Z
"""

import torch
from torch import Tensor

ROUNDS = 64
"""Samples of each prompt."""
LEAST_EFFECTIVE = 8.0
"""Samples that the weights must amount to, below which a point is left out."""


def ideal_curve(rewards: Tensor) -> list[tuple[float, float]]:
    """(KL in nats, mean reward) of the ideal policy from far to near; `rewards` (prompts, samples) of the reference."""
    points = [_tilted(rewards, 10 ** (exponent / 10)) for exponent in range(15, -16, -1)]
    return [(kl, reward) for kl, reward, effective in points if effective >= LEAST_EFFECTIVE]


def _tilted(rewards: Tensor, temperature: float) -> tuple[float, float, float]:
    weights = torch.softmax(rewards / temperature, dim=1)
    kl = (weights * (weights * rewards.shape[1]).clamp(min=1e-30).log()).sum(1)
    return float(kl.mean()), float((weights * rewards).sum(1).mean()), float((1 / (weights**2).sum(1)).mean())
