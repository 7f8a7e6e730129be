"""A stand-in for `torch.nn.attention.varlen.varlen_attn` on CPUs, after its definition; autograd differentiates it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpo_kit.trainer import on_gpu, prefix


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Sequence by sequence, head by head: the last query stands at the last key, and a query at place i sees the keys
    from i - left to i + right (-1: no limit)."""
    heads, key_heads = query.shape[1], key.shape[1]
    assert heads == key_heads or (enable_gqa and heads % key_heads == 0)
    assert (
        query_ends.dtype == key_ends.dtype == torch.int32 and query_ends[-1] == len(query) and key_ends[-1] == len(key)
    )
    left, right = window_size
    results = []
    for row in range(len(query_ends) - 1):
        q, k, v = (
            x[ends[row] : ends[row + 1]] for x, ends in ((query, query_ends), (key, key_ends), (value, key_ends))
        )
        assert 0 < len(q) <= longest_query and len(k) <= longest_key
        place = torch.arange(len(q))[:, None] + len(k) - len(q)
        keys = torch.arange(len(k))
        seen = (keys >= place - left if left >= 0 else True) & (keys <= place + right if right >= 0 else True)
        by_head = []
        for head in range(heads):
            shared = head // (heads // key_heads)
            scores = (q[:, head].float() @ k[:, shared].float().T * scale).masked_fill(~seen, -torch.inf)
            by_head.append(scores.softmax(-1) @ v[:, shared].float())
        results.append(torch.stack(by_head, 1).to(query.dtype))
    return torch.cat(results)


def take_one_call(patch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """From now on attention takes the way of GPUs, by the stand-in; returns the shapes of queries and keys that it is
    called with."""
    calls: list[tuple[int, ...]] = []

    def counted(query: Tensor, key: Tensor, *told: object, **options: object) -> Tensor:
        calls.append((len(query), len(key)))
        return varlen_attn(query, key, *told, **options)  # type: ignore[arg-type]

    patch.setattr(on_gpu, "varlen_attn", counted)
    patch.setattr(prefix, "takes_one_call", lambda query, value: True)
    return calls
