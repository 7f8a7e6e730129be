"""Kernels that only a GPU has, each taken where it gives what the plain way gives: attention of rows of any length in
one call (see prefix.py), and a whole RMSNorm. Loaded where there is a GPU.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import rms_norm

from dpo_kit.trainer.prefix import AGREES, Layout, attend_row_by_row, build_layout

log = logging.getLogger(__name__)


@functools.cache
def agrees_at_once(device: torch.device, dtype: torch.dtype, width: int, groups: int) -> bool:
    """Whether one call gives what a call for each row gives, tried once on two random pairs, gradients too."""
    ids = torch.tensor([[2, 3, 4, 5, 6], [7, 8, 9, 0, 0], [2, 3, 4, 9, 0], [7, 8, 0, 0, 0]])
    layout = build_layout(ids, (ids > 0).long()).to(device)
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, layout.ids.shape[1], heads, width) for heads in (groups, 1, 1)]
    q, k, v = (torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes)
    scale = width**-0.5
    try:
        with torch.enable_grad():
            for window in (None, 2):
                ways = [way(q, k, v, layout, scale, window) for way in (attend_at_once, attend_row_by_row)]
                at_once, by_row = ([seen, *torch.autograd.grad(seen.square().sum(), (q, k, v))] for seen in ways)
                for ours, theirs in zip(at_once, by_row, strict=True):
                    if (ours - theirs).norm() > AGREES[dtype] * theirs.norm():
                        raise ArithmeticError("FlashAttention gives other values for rows of several lengths")
    except Exception as error:  # whatever a build of PyTorch or an old card raises
        log.info("attention is worked out row by row: %s", str(error).strip()[:80])
        return False
    return True


def attend_at_once(
    queries: Tensor, keys: Tensor, values: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    """As `attend_row_by_row`, in one call.

    A row's last query stands at its last key, as FlashAttention aligns queries and keys of different lengths.
    """
    query, key, value = queries.squeeze(0), keys.squeeze(0), values.squeeze(0)  # views, backwards too
    if layout.keys is not None:  # a token is in at most two rows: its two gradients add up with one rounding
        key, value = key.index_select(0, layout.keys), value.index_select(0, layout.keys)
    left = window - 1 if window and window < layout.longest[1] else -1
    grouped: dict[str, Any] = {"enable_gqa": key.shape[1] < query.shape[1], "window_size": (left, 0), "scale": scale}
    ends = (layout.query_ends, layout.key_ends)
    seen: Any = varlen_attn(query, key, value, *ends, *layout.longest, **grouped)
    return seen[None]


@torch.no_grad()
def fuse_norms(model: torch.nn.Module) -> bool:
    """Compute each RMSNorm of `model` by PyTorch's one kernel instead of the eight or so that it is written in; whether
    there are any.

    Only where that gives the same on random numbers: some families add 1 to the weight.
    """
    named = (module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    norms: list[Any] = [norm for norm in named if isinstance(getattr(norm, "variance_epsilon", None), float)]
    for norm in norms:
        fused = functools.partial(_rms_norm, norm)
        hidden = torch.randn(3, len(norm.weight), generator=torch.Generator().manual_seed(0)).to(norm.weight)
        expected = norm(hidden)
        if not torch.allclose(fused(hidden), expected, rtol=1e-5 if hidden.dtype == torch.float32 else 2e-2):
            return False
        norm.forward = fused
    return bool(norms)


def _rms_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon).to(hidden_states.dtype)
