"""Fresh samples of a model at temperature 1, whatever generation config it ships."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpo_kit.model.batches import pad_batch, pad_token_id
from dpo_kit.model.chats import prompt_of
from dpo_kit.model.tokens import decode_answer, encode_prompts
from dpo_kit.model.turns import stop_ids

DRAWN_AT_ONCE = 64  # answers, on a CPU
USUAL_TOP_K = 50  # of transformers' generate, where a model's own config says nothing


@dataclass(frozen=True)
class Sample:
    """One completion drawn from a model.

    `row` is the row whose prompt was continued; `token_ids` end in a token that ends an answer unless `cut`, which says
    that the token limit came first; `text` is the completion without it (`decode_answer`).
    """

    row: dict[str, Any]
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    cut: bool


def draw_samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    processor: Callable[[Tensor], LogitsProcessor] | None = None,
    accelerator: Accelerator | None = None,
) -> list[Sample]:
    """One completion per row (`prompt`: text or messages; TRL's columns `tools` and `chat_template_kwargs`), in the
    order of the rows. `batch_size` rows at a time, by default `rows_at_once`; another number draws other samples.

    Temperature 1, no top-k, top-p, penalty, ban or forced token, whatever `model.generation_config` holds, until a
    token that ends an answer (`stop_ids`). `processor` makes, from the attention mask of a batch's prompts, what
    changes the logits on purpose. Draws from torch's global random state: call it inside `measuring`. The processes of
    an `accelerator` share out the rows of each batch and all get the samples that one process would draw: all must call
    this, from the same random state. Where the weights are shared out (FSDP, DeepSpeed) each of them draws every row.
    """
    prompts = encode_prompts(tokenizer, [prompt_of(row) for row in rows])
    config = GenerationConfig(
        do_sample=False,  # `Draw` has drawn
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(tokenizer, model) or None,
        pad_token_id=pad_token_id(tokenizer),
        use_cache=True,  # the trainer switches the model's own off under activation checkpointing
    )
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    drawn: dict[int, list[int]] = {}
    longest = max(map(len, prompts), default=0) + max_new_tokens
    batch_size = batch_size or rows_at_once(model, longest)
    with _generation_config(model, config):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = _generate(model, [prompts[i] for i in batch], config, processor, accelerator)
            drawn.update(zip(batch, ids, strict=True))
    ends, samples = set(config.eos_token_id or []), []
    for index, row in enumerate(rows):
        end = next((place + 1 for place, token in enumerate(drawn[index]) if token in ends), None)
        token_ids = drawn[index][:end]
        text = decode_answer(tokenizer, token_ids)
        samples.append(Sample(row, prompts[index], token_ids, text, cut=end is None))
    return samples


def rows_at_once(model: Any, length: int) -> int:
    """Rows of `length` tokens that are drawn at a time: as many as an eighth of the device's memory holds with their
    keys, values and logits, so that equal machines draw equal samples; on a GPU fewer where less is free, on a CPU at
    most `DRAWN_AT_ONCE`.
    """
    text = model.config.get_text_config()
    row = 2 * text.num_hidden_layers * cache_width(text) * model.dtype.itemsize * length + 12 * text.vocab_size
    if model.device.type != "cuda":
        return max(1, min(DRAWN_AT_ONCE, psutil.virtual_memory().total // 8 // row))
    free, total = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, min(total // 8, (free + unused) // 2) // row)


def cache_width(text: Any) -> int:
    """Numbers that a layer keeps of a token as keys, and as many as values; the hidden size where it has no heads."""
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return width * (getattr(text, "num_key_value_heads", None) or heads)


def _generate(
    model: Any,
    prompts: list[list[int]],
    config: GenerationConfig,
    processor: Callable[[Tensor], LogitsProcessor] | None,
    accelerator: Accelerator | None,
) -> list[list[int]]:
    place, count = 0, 1
    if accelerator is not None and accelerator.distributed_type not in (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
    ):
        place, count = accelerator.process_index, accelerator.num_processes
    rows = list(range(len(prompts)))[place::count] or [0]  # none left: the first again
    ids, mask = pad_batch([prompts[row] for row in rows], config.pad_token_id, model.device, "left")
    draw = Draw(rows, len(prompts))
    processors = [processor(mask), draw] if processor else [draw]
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    own = out[:, ids.shape[1] :].tolist()
    if count == 1:
        return own
    drawn = dict(gather_object(list(zip(rows, own, strict=True))))
    draw.catch_up(max(map(len, drawn.values())))
    return [drawn[row] for row in range(len(prompts))]


class Draw(LogitsProcessor):
    """Draws the next token of some `rows` of a batch as if all `count` rows were drawn here: argmax of p/Exp(1), which
    is how torch.multinomial draws, with noise made for all of them. The token's score is the largest.
    """

    def __init__(self, rows: list[int], count: int) -> None:
        self.rows, self.count, self.steps = rows, count, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.noise = scores.new_empty(self.count, scores.shape[-1])
        self.steps += 1
        return scores.softmax(-1) / self.noise.exponential_()[self.rows]

    def catch_up(self, steps: int) -> None:
        """Bring the random state to where it is after so many steps: other rows may have gone on for longer."""
        for _ in range(steps - self.steps):
            self.noise.exponential_()


class Shaped(LogitsProcessor):
    """Shapes logits as `generate` does: repetition penalty; then greedy, or temperature, top-k, top-p and min-p."""

    def __init__(self, config: GenerationConfig) -> None:
        penalty, top_k, warmth, top_p = config.repetition_penalty, config.top_k, config.temperature, config.top_p
        self.steps: list[Any] = (
            [RepetitionPenaltyLogitsProcessor(float(penalty))] if penalty not in (None, 0, 1) else []
        )
        if not config.do_sample:
            self.steps.append(TopKLogitsWarper(1))
            return
        self.steps += [TemperatureLogitsWarper(float(warmth))] if warmth not in (None, 1) else []
        self.steps += [TopKLogitsWarper(USUAL_TOP_K if top_k is None else top_k)] if top_k != 0 else []
        self.steps += [TopPLogitsWarper(float(top_p))] if top_p not in (None, 1) else []
        self.steps += [MinPLogitsWarper(float(config.min_p))] if config.min_p else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for step in self.steps:
            scores = step(input_ids, scores)
        return scores


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    # `generate(generation_config=...)` fills what is unset from the model's own config, so bans, penalties
    # and forced tokens would come back: the model's own is put aside. A PEFT wrapper may hold one besides.
    holders = [each for each in model.modules() if "generation_config" in vars(each)]
    kept = [each.generation_config for each in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        with without_router_logits(model):
            yield
    finally:
        for holder, own in zip(holders, kept, strict=True):
            holder.generation_config = own


@contextmanager
def without_router_logits(model: Any) -> Iterator[None]:
    """Inside, a mixture of experts returns none: generation fails on them (huggingface/transformers#29087)."""
    text = model.config.get_text_config()
    if not (asked := getattr(text, "output_router_logits", False)):
        yield
        return
    text.output_router_logits = False
    try:
        yield
    finally:
        text.output_router_logits = asked
