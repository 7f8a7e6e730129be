"""An independent oracle for KL: every sequence of a vocabulary of 5 with at most 5 tokens, enumerated.

Works with plain forward passes without padding, and shares no code with dpo_kit.
"""

import math
from functools import cache
from itertools import groupby, product
from typing import Any

import torch

VOCABULARY, LIMIT, EOS = 5, 5, 1


@cache
def all_sequences() -> list[list[int]]:
    """Sequences that end in their first EOS, and those that reach the limit without one; shortest first."""
    return [
        list(tokens)
        for length in range(1, LIMIT + 1)
        for tokens in product(range(VOCABULARY), repeat=length)
        if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == LIMIT)
    ]


@torch.no_grad()
def logp_rows(model: Any, prompt: list[int], completions: list[list[int]]) -> list[torch.Tensor]:
    """Per completion the log-probabilities of every token at each position: (tokens, vocabulary), float64.

    Completions of one length go through the model together, in the order given.
    """
    rows: list[torch.Tensor] = []
    for length, group in groupby(completions, key=len):
        logits = model(torch.tensor([prompt + completion for completion in group])).logits.double()
        rows.extend(logits.log_softmax(-1)[:, len(prompt) - 1 : len(prompt) + length - 1])
    return rows


def logps(model: Any, prompt: list[int], completions: list[list[int]]) -> list[float]:
    """Summed log-probability of each completion, in nats."""
    rows = logp_rows(model, prompt, completions)
    return [float(row[range(len(each)), each].sum()) for row, each in zip(rows, completions, strict=True)]


def exact_kl(p: Any, q: Any, prompt: list[int]) -> float:
    """KL(p‖q) of the distribution over sequences cut at the limit, in nats: Σ p(y)·[log p(y) − log q(y)]."""
    pairs = zip(*(logps(model, prompt, all_sequences()) for model in (p, q)), strict=True)
    return math.fsum(math.exp(logp) * (logp - logq) for logp, logq in pairs)


def cut_probability(p: Any, prompt: list[int]) -> float:
    """Probability that a sample reaches the limit without EOS."""
    cut = [each for each in all_sequences() if each[-1] != EOS]
    return math.fsum(math.exp(logp) for logp in logps(p, prompt, cut))
