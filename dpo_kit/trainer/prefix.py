"""Each token of a batch once: no padding is computed, and a prompt that chosen and rejected share is computed once.

A batch of padded rows goes through the backbone as one flat row of its distinct tokens. Only attention looks at the
rows again: a row's own tokens see the beginning that it shares and themselves, on a GPU in one call for all rows, on a
CPU row by row. The hidden states come back in the shape that the caller expects, so that losses, heads and trainers
need not know. Exact for causal softmax attention over all earlier tokens or a sliding window of them; `why_not` names
the models where it is not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PromptLearningConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_kit.model.batches import bare
from dpo_kit.trainer.speed import SHARING

WORTH = 0.95  # of the padded slots: above it, gathering costs what it saves
STEP = 32  # tokens: products in bf16 come in sizes of a multiple, as a CPU's library (oneDNN) takes a millisecond and
# 0.7 MB for its code for each new shape, and keeps a thousand of them
AGREES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # largest difference of states, relative
LONGEST = 1024  # tokens of a row whose scores are kept for the backward pass; beyond it they would outweigh all else
BLOCK = 256  # queries at a time: each block leaves out the keys after it, and what it holds stays in the cache
INEXACT = {
    "softcap": "its attention scores are capped",
    "s_aux": "its attention has sinks",
    "position_bias": "its attention adds a bias of positions",
}  # by what an architecture hands to its attention


@dataclasses.dataclass(frozen=True)
class Layout:
    """A batch of N padded rows of L slots as one flat row of its T distinct tokens.

    ids, positions: (1, T); source: (N * L,), the flat place of every slot (any place for padding); rows: of each row
    how many tokens it shares with the row N/2 before it, and how many of its own stand in the flat row, one row after
    the other. Tokens after these belong to no row.

    For one attention call over the R rows that have own tokens: keys (K,), the flat places of each row's beginning and
    own tokens, or None where no row shares any; query_ends, key_ends: (R + 1,) int32, where those of each row end.
    """

    ids: Tensor
    positions: Tensor
    source: Tensor
    rows: tuple[tuple[int, int], ...]
    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor

    @property
    def rest(self) -> int:
        """Tokens that belong to no row."""
        return self.ids.shape[1] - sum(own for _, own in self.rows)

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest row: its own, and whole."""
        return max(own for _, own in self.rows), max(shared + own for shared, own in self.rows if own)

    def fill_up(self, step: int) -> Layout:
        """With tokens that belong to no row, up to a multiple of `step`."""
        more = (0, -self.ids.shape[1] % step)
        return dataclasses.replace(self, ids=pad(self.ids, more), positions=pad(self.positions, more))

    def to(self, device: torch.device, non_blocking: bool = False) -> Layout:
        """On `device`, as accelerate moves a batch."""
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        moved: dict[str, Any] = {name: each.to(device, non_blocking=non_blocking) for name, each in tensors.items()}
        return dataclasses.replace(self, **moved)


def build_layout(ids: Tensor, mask: Tensor) -> Layout:
    """The layout of rows `ids` (N, L) whose tokens are where `mask` (N, L) is not 0, where these two are.

    Row i and row i + N/2 (chosen and rejected, as TRL stacks them) share what they have in common from slot 0 on.
    Worked out on the CPU, so that a GPU is waited for once at most, and not at all where the rows are still on the CPU.
    """
    device = ids.device
    ids, real = ids.cpu(), mask.cpu().bool()
    shared = _shared_lengths(ids, real)
    kept = real & (torch.arange(ids.shape[1]) >= shared[:, None])
    place = (kept.flatten().cumsum(0) - 1).view_as(ids)
    half = len(ids) // 2
    whole = torch.where(kept, place, place.roll(half, 0)) if half else place
    slots = torch.arange(ids.shape[1]).expand_as(ids)
    # padding is spread over all tokens: its zero gradients do not queue for one
    padding = torch.arange(ids.numel()).view_as(ids) % max(1, int(kept.sum()))
    rows = tuple(zip(shared.tolist(), kept.sum(1).tolist(), strict=True))
    seen = real & (kept.sum(1) > 0)[:, None]
    busy = [(own, shared + own) for shared, own in rows if own]  # queries and keys of each row that has own tokens
    ends = [list(accumulate(lengths, initial=0)) for lengths in zip(*busy, strict=True)] or [[0], [0]]
    layout = Layout(
        ids=ids[kept][None],
        positions=slots[kept][None],
        source=torch.where(real, whole, padding).flatten(),
        rows=rows,
        keys=whole[seen] if any(length for length, _ in rows) else None,
        query_ends=torch.tensor(ends[0], dtype=torch.int32),
        key_ends=torch.tensor(ends[1], dtype=torch.int32),
    )
    return layout if device.type == "cpu" else layout.to(device)


class LaidOut:
    """A data collator whose batches of one set of rows carry their layout, worked out before they reach the device.

    KTO's hold two sets, of which TRL would hand both models' calls one layout; they are laid out when they arrive.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        if [name for name in batch if name.endswith("input_ids")] == ["input_ids"]:
            batch["layout"] = build_layout(batch["input_ids"], batch["attention_mask"])
        return batch


def _shared_lengths(ids: Tensor, real: Tensor) -> Tensor:
    """(N,): how many first slots of each row another row computes for it; 0 for the rows of the first half."""
    half = len(ids) // 2
    lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if len(ids) == 2 * half:
        same = (ids[:half] == ids[half:]) & real[:half] & real[half:]
        lengths[half:] = same.long().cumprod(1).sum(1)
    return lengths


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    windows: list[int | None] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every row of `layout` to itself, to the last `sliding_window` tokens of it where that is
    given; transformers' own SDPA where there is no layout. Each call adds its window to `windows`.

    query (1, heads, T, width), key and value (1, key heads, T, width); returns (1, T, heads, width).
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name, reason in INEXACT.items():
        if options.get(name) is not None:
            raise NotImplementedError(reason)
    if windows is not None:
        windows.append(sliding_window)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    query, key, value = in_autocast_dtype(query, key, value)  # once, not for every row
    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))  # tokens first, as they lie in memory
    way: Callable[..., Tensor] = attend_row_by_row
    if takes_one_call(query, value):
        from dpo_kit.trainer.on_gpu import attend_at_once

        way = attend_at_once
    with torch.autocast(query.device.type, enabled=False):
        return way(queries, keys, values, layout, scale, sliding_window), None


def takes_one_call(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch has a FlashAttention kernel for rows of any length on this device, in this dtype and width."""
    width, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    fits = half and width == value.shape[-1] and width <= 256 and width % 8 == 0
    if not (fits and query.is_cuda):
        return False
    from dpo_kit.trainer.on_gpu import agrees_at_once

    return agrees_at_once(query.device, query.dtype, width, query.shape[1] // value.shape[1])


def attend_row_by_row(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    kernel: Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor] | None = None,
) -> Tensor:
    """A call of `kernel` (`attend_row`) for each row. queries (1, T, heads, width), keys and values (1, T, key heads,
    width); as queries.
    """
    groups = queries.shape[2] // keys.shape[2]
    if groups > 1:
        keys, values = (x.repeat_interleave(groups, 2) for x in (keys, values))
    lengths = [*(own for _, own in layout.rows), layout.rest]
    # split, not sliced, off the whole: their gradient is one cat
    parts = [x.split(lengths, 1)[:-1] for x in (queries, keys, values)]
    attended = []
    for row, (shared, own) in enumerate(layout.rows):
        if own:
            first = row - len(layout.rows) // 2
            whole = [torch.cat((x[first][:, :shared], x[row]), 1) if shared else x[row] for x in parts[1:]]
            query, key, value = (x.transpose(1, 2) for x in (parts[0][row], *whole))
            seen = (kernel or attend_row)(query, key, value, scale, window)
            attended.append(seen.transpose(1, 2))
    return torch.cat([*attended, queries.new_zeros(1, layout.rest, *queries.shape[2:])], 1)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(kind)) for each in tensors)


def attend_row(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of the last tokens of a row to all of it, or to the last `window` tokens up to each.

    query (1, heads, own, width), key and value (1, heads, shared + own, width); as query.
    """
    own, whole = query.shape[-2], key.shape[-2]
    on_cpu, half = query.device.type == "cpu", query.dtype == torch.bfloat16
    if (window and window < whole) or (on_cpu and whole <= LONGEST and (half or own < whole)):
        return attend_in_blocks(query, key, value, scale, min(window or whole, whole))
    if own == whole:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(own, whole), scale=scale)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """`attend_row` by plain matrix products: PyTorch's fused kernel takes two to four times as long in bf16 on CPUs
    (AVX-512, torch 2.13), and computes a square of queries and keys where only a part is asked for.
    """
    own, whole = query.shape[-2], key.shape[-2]
    step = STEP if query.dtype == torch.bfloat16 else 1
    shared = whole - own
    first, end = shared // step * step, whole + -whole % step  # filled up on both sides, which no token of the row sees
    q = pad(query[0], (0, 0, shared - first, end - whole))
    k, v = (pad(each[0], (0, 0, 0, end - whole)) for each in (key, value))
    blocks = []
    for start in range(first, end, BLOCK):
        stop = min(start + BLOCK, end)
        since = max(0, start - window + 1) // step * step
        unseen = query.new_full((stop - start, stop - since), -torch.inf).triu(start - since + 1)
        if since or window < stop:
            unseen += query.new_full(unseen.shape, -torch.inf).tril(start - since - window)
        scores = torch.baddbmm(
            unseen.expand(len(q), -1, -1),
            q[:, start - first : stop - first],
            k[:, since:stop].transpose(1, 2),
            alpha=scale,
        )
        blocks.append(scores.softmax(-1) @ v[:, since:stop])
    return torch.cat(blocks, 1)[None, :, shared - first : whole - first]


AttentionInterface.register(SHARING, attend)
AttentionMaskInterface.register(SHARING, sdpa_mask)


def share_prefixes(model: PreTrainedModel) -> None:
    """Make the backbone of `model` compute each distinct token of a batch once. Ask `why_not` first."""
    bare(model).set_attn_implementation(SHARING)
    backbone = bare(model).base_model
    backbone.forward = functools.wraps(backbone.forward)(functools.partial(_forward, backbone.forward))


# what has, brought or asked for, the shape of the padded batch
BROUGHT = ("position_ids", "past_key_values", "inputs_embeds", "use_cache", "cache_position")
WANTED = ("output_hidden_states", "output_attentions", "output_router_logits")


def _forward(
    original: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> Any:
    plain = functools.partial(original, input_ids=input_ids, attention_mask=attention_mask, **options)
    if input_ids is None or attention_mask is None or attention_mask.shape != input_ids.shape:
        return plain()
    if any(options.get(name) is not None and options[name] is not False for name in BROUGHT + WANTED):
        return plain()
    layout = layout or build_layout(input_ids, attention_mask)
    if layout.ids.numel() > WORTH * input_ids.numel():
        return plain()
    if layout.ids.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        layout = layout.fill_up(2 * STEP)
    mask = attention_mask[:1, None, None, :1]  # 4-D: used as it is
    taken = {"attention_mask": mask, "position_ids": layout.positions}
    outputs = original(**options | taken, input_ids=layout.ids, layout=layout)
    hidden = outputs.last_hidden_state.squeeze(0).index_select(0, layout.source)
    outputs.last_hidden_state = hidden.view(*input_ids.shape, -1)
    return outputs


def why_not(model: PreTrainedModel) -> str | None:
    """Why the tokens of a batch cannot be computed once each in `model`; None where they can, which is tried out."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if getattr(config, "attn_logit_softcapping", None):
        return INEXACT["softcap"]
    if config is not model.config:
        return "it reads more than text"
    if kinds:
        return f"it has layers with {', '.join(sorted(kinds))}"
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return "its attention has dropout"
    if is_peft_model(model) and isinstance(model.active_peft_config, PromptLearningConfig):
        return "its adapter puts virtual tokens before the prompt"
    if config._attn_implementation not in ("sdpa", SHARING):
        return f"its attention is {config._attn_implementation}, not sdpa"
    return _tried_out(bare(model))


@torch.no_grad()
def _tried_out(model: Any) -> str | None:
    """Two random pairs both ways; and since they are shorter than most windows, what window each layer asks for."""
    config, before = model.config.get_text_config(), model.config._attn_implementation
    windows: list[int | None] = []
    try:
        # rows (4, 24) whose rows 0 and 2, 1 and 3 begin alike, with padding on the right
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, vocabulary, (4, 24), generator=torch.Generator().manual_seed(0))
        ids[2:, :12] = ids[:2, :12]
        mask = (torch.arange(24) < torch.tensor([24, 15, 18, 20])[:, None]).long().to(model.device)
        ids = ids.to(model.device)
        expected = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        model.set_attn_implementation(SHARING)
        flat = _forward(model.base_model.forward, ids, mask, windows=windows, use_cache=False).last_hidden_state
    except NotImplementedError as error:
        return str(error)
    except Exception as error:  # whatever an architecture raises where it cannot take a flat row
        return f"it refuses a flat row ({type(error).__name__})"
    finally:
        model.set_attn_implementation(before)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if windows != [window if kind == "sliding_attention" else None for kind in kinds]:
        return "its layers do not ask for the sliding windows of its config"
    difference = (expected - flat)[mask.bool()].abs().max() / expected[mask.bool()].abs().max()
    agrees = bool(difference <= AGREES.get(expected.dtype, 1e-4))
    return None if agrees else "its hidden states differ in a flat row"
