"""Each token of a batch once: no padding is computed, and a prompt that chosen and rejected share is computed once.

A batch of padded rows goes through the backbone as one flat row of its distinct tokens; only attention looks at the
rows again, each row's own tokens at the shared beginning and at themselves. The hidden states come back in the
shape that the caller expects, so that losses, heads and trainers are none the wiser. Exact for causal softmax attention
over all earlier tokens; `why_not` names the models where it is not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PromptLearningConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

NAME = "dpo_kit_shared_prefix"  # of our attention, among transformers' own
BLOCKS = f"{NAME}_blocks"
SHARING = {"sdpa": NAME, "flex_attention": BLOCKS}  # what takes the place of which
WORTH = 0.95  # of the padded slots: above it, gathering costs what it saves
STEP = 32  # tokens: products in bf16 come in sizes of a multiple, as a CPU's library (oneDNN) takes a millisecond and
# 0.7 MB for its code for each new shape, and keeps a thousand of them
AGREES = {
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # largest difference of hidden states, relative


@dataclasses.dataclass(frozen=True)
class Layout:
    """A batch of N padded rows of L slots as one flat row of its T distinct tokens.

    ids, positions: (1, T); source: (N * L,), the flat place of every slot (0 for padding); rows: of each row how many
    tokens it shares with the row N/2 before it, and how many of its own stand in the flat row, in the order of rows.
    Tokens after these belong to no row.
    """

    ids: Tensor
    positions: Tensor
    source: Tensor
    rows: tuple[tuple[int, int], ...]

    @property
    def rest(self) -> int:
        """Tokens that belong to no row."""
        return self.ids.shape[1] - sum(own for _, own in self.rows)

    def fill_up(self, step: int) -> Layout:
        """With tokens that belong to no row, up to a multiple of `step`."""
        more = (0, -self.ids.shape[1] % step)
        return dataclasses.replace(self, ids=pad(self.ids, more), positions=pad(self.positions, more))

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """What each token of the flat row sees: its own row up to itself, and what another row computes for it."""
        rows = (*self.rows, (0, self.rest))
        shared, own = (torch.tensor(part, device=self.ids.device) for part in zip(*rows, strict=True))
        row = torch.arange(len(own), device=own.device).repeat_interleave(own)
        lender, lent, slots = row - len(self.rows) // 2, shared[row], self.positions[0]

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            borrowed = (row[key] == lender[query]) & (slots[key] < lent[query])
            return borrowed | ((row[key] == row[query]) & (key <= query))

        on_gpu = row.device.type == "cuda"  # compiled, it never holds queries × keys
        return create_block_mask(sees, None, None, len(row), len(row), device=row.device, _compile=on_gpu)


def build_layout(ids: Tensor, mask: Tensor) -> Layout:
    """The layout of rows `ids` (N, L) whose tokens are where `mask` (N, L) is not 0.

    Row i and row i + N/2 (chosen and rejected, as TRL stacks them) share what they have in common from slot 0 on.
    """
    real = mask.bool()
    shared = _shared_lengths(ids, real)
    kept = real & (torch.arange(ids.shape[1], device=ids.device) >= shared[:, None])
    place = (kept.flatten().cumsum(0) - 1).view_as(ids)
    half = len(ids) // 2
    source = torch.where(kept, place, place.roll(half, 0)) if half else place
    slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Layout(
        ids=ids[kept][None],
        positions=slots[kept][None],
        source=source.masked_fill(~real, 0).flatten(),
        rows=tuple(zip(shared.tolist(), kept.sum(1).tolist(), strict=True)),
    )


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
    kernel: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every row of `layout` to itself; transformers' own SDPA where there is no layout.

    query (1, heads, T, width), key and value (1, key heads, T, width); returns (1, T, heads, width).
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kernel = kernel or attend_row
    groups = query.shape[1] // key.shape[1]
    lengths = [*(own for _, own in layout.rows), layout.rest]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    kind = query.device.type
    query, key, value = _in_autocast_dtype(query, key, value)  # once, not for every row
    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))  # tokens first, as they lie in memory
    if groups > 1:
        keys, values = (x.repeat_interleave(groups, 2) for x in (keys, values))
    parts = [x.split(lengths, 1)[:-1] for x in (queries, keys, values)]
    attended = []
    with torch.autocast(kind, enabled=False):
        for row, (shared, own) in enumerate(layout.rows):
            if own:
                q, k, v = parts[0][row], *(_whole_row(each, row, shared) for each in parts[1:])
                seen = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
                attended.append(seen.transpose(1, 2))
    return torch.cat([*attended, queries.new_zeros(1, layout.rest, *queries.shape[2:])], 1), None


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(kind)) for each in tensors)


def _whole_row(parts: Sequence[Tensor], row: int, shared: int) -> Tensor:
    """(1, shared + own, heads, width). The parts are split, not sliced, off the whole: their gradient is one cat."""
    return torch.cat((parts[row - len(parts) // 2][:, :shared], parts[row]), 1) if shared else parts[row]


def attend_row(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens of a row to all of it.

    query (1, heads, own, width), key and value (1, heads, shared + own, width); as query.
    """
    own, whole = query.shape[-2], key.shape[-2]
    if query.device.type == "cpu" and pays_in_blocks(query, key):
        return attend_in_blocks(query, key, value, scale)
    if own == whole:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(own, whole), scale=scale)


LONGEST = 1024  # tokens of a row whose scores are kept for the backward pass; beyond it they would outweigh all else


def pays_in_blocks(query: Tensor, key: Tensor) -> bool:
    """Whether `attend_in_blocks` is the better way on a CPU."""
    own, whole = query.shape[-2], key.shape[-2]
    return whole <= LONGEST and (query.dtype == torch.bfloat16 or own < whole)


BLOCK = 256  # queries at a time: each block leaves out the keys after it, and what it holds stays in the cache


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
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
        later = query.new_full((stop - start, stop), -torch.inf).triu(start + 1)
        scores = torch.baddbmm(
            later.expand(len(q), -1, -1), q[:, start - first : stop - first], k[:, :stop].transpose(1, 2), alpha=scale
        )
        blocks.append(scores.softmax(-1) @ v[:, :stop])
    return torch.cat(blocks, 1)[None, :, shared - first : whole - first]


def attend_by_block_mask(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attend` in one call of FlexAttention for all rows. It has no backward pass on CPUs (torch 2.13)."""
    query, key, value = _in_autocast_dtype(query, key, value)
    mask: Any = layout.block_mask if layout else attention_mask
    return flex_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(BLOCKS, attend_by_block_mask)
AttentionMaskInterface.register(BLOCKS, flex_attention_mask)


def share_prefixes(model: PreTrainedModel) -> None:
    """Make the backbone of `model` compute each distinct token of a batch once. Ask `why_not` first."""
    bare = _bare(model)
    _let_read_layouts(bare)
    backbone = bare.base_model
    backbone.forward = functools.wraps(backbone.forward)(functools.partial(_forward, backbone.forward))


def _let_read_layouts(bare: PreTrainedModel) -> None:
    now = bare.config._attn_implementation
    bare.set_attn_implementation(SHARING.get(now, now))


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether `share_prefixes` was applied to `model`."""
    return _bare(model).config._attn_implementation in SHARING.values()


def _bare(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _forward(
    original: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
) -> Any:
    plain = functools.partial(original, input_ids=input_ids, attention_mask=attention_mask, **options)
    if (
        input_ids is None
        or attention_mask is None
        or attention_mask.shape != input_ids.shape
        or _asks_for_more(options)
    ):
        return plain()
    layout = build_layout(input_ids, attention_mask)
    if layout.ids.numel() > WORTH * input_ids.numel():
        return plain()
    if layout.ids.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        layout = layout.fill_up(2 * STEP)
    taken = {
        "attention_mask": attention_mask[:1, None, None, :1],
        "position_ids": layout.positions,
    }  # 4-D: used as it is
    outputs = original(**options | taken, input_ids=layout.ids, layout=layout)
    hidden = outputs.last_hidden_state[0].index_select(0, layout.source)
    outputs.last_hidden_state = hidden.view(*input_ids.shape, -1)
    return outputs


def _asks_for_more(options: dict[str, Any]) -> bool:
    """Whether the caller brings or wants something that has the shape of the padded batch."""
    brought = ("position_ids", "past_key_values", "inputs_embeds", "use_cache", "cache_position")
    wanted = ("output_hidden_states", "output_attentions", "output_router_logits")
    return any(options.get(name) is not None and options[name] is not False for name in brought + wanted)


def why_not(model: PreTrainedModel) -> str | None:
    """Why the tokens of a batch cannot be computed once each in `model`; None where they can, which is tried out."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if config is not model.config:
        return "it reads more than text"
    if kinds or (window and not getattr(config, "layer_types", None)):
        return f"it has layers with {', '.join(sorted(kinds)) or 'a sliding window'}"
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return "its attention has dropout"
    if is_peft_model(model) and isinstance(model.active_peft_config, PromptLearningConfig):
        return "its adapter puts virtual tokens before the prompt"
    if config._attn_implementation not in {*SHARING, *SHARING.values()}:
        return f"its attention is {config._attn_implementation}, not {' or '.join(SHARING)}"
    return _tried_out(model)


@torch.no_grad()
def _tried_out(model: PreTrainedModel) -> str | None:
    """Two random pairs both ways."""
    bare = _bare(model)
    before = bare.config._attn_implementation
    try:
        ids, mask = _random_pairs(bare)
        expected = bare.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        _let_read_layouts(bare)
        found = _forward(bare.base_model.forward, ids, mask, use_cache=False).last_hidden_state
    except Exception as error:  # whatever an architecture raises where it cannot take a flat row
        return f"it refuses a flat row ({type(error).__name__})"
    finally:
        bare.set_attn_implementation(before)
    difference = (expected - found)[mask.bool()].abs().max() / expected[mask.bool()].abs().max()
    agrees = bool(difference <= AGREES.get(expected.dtype, 1e-4))
    return None if agrees else "its hidden states differ in a flat row"


def _random_pairs(model: Any) -> tuple[Tensor, Tensor]:
    """Rows (4, 24) whose rows 0 and 2, 1 and 3 begin alike, with padding on the right, and their mask."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (4, 24), generator=draw)
    ids[2:, :12] = ids[:2, :12]
    mask = (torch.arange(24) < torch.tensor([24, 15, 18, 20])[:, None]).long()
    return ids.to(model.device), mask.to(model.device)
