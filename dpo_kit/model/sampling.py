"""Fresh samples of a model at temperature 1, whatever generation config it ships, and measuring without
traces.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

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
    Trainer,
)

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


@contextmanager
def measuring(trainer: Trainer, *models: Any, seed: int = 0, as_trained: bool = False) -> Iterator[None]:
    """Measure with the trainer's models and leave no trace in its training.

    Inside: no gradients, no dropout, a forked random state seeded with `seed`, and the precision of the weights, which
    a small drift needs: bf16 autocast moves an answer by half a nat. `as_trained` takes the trainer's own autocast, for
    what its loss reads. After: the random state, each module's mode and each parameter's `requires_grad` (which
    switching adapters changes) are as before.
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
    """One completion per row (`prompt`: text or messages; TRL's columns `tools` and `chat_template_kwargs`), drawn from
    the model itself; in the order of the rows. `batch_size` rows at a time, by default `rows_at_once`; another number
    draws other samples.

    Temperature 1, no top-k, top-p, penalty, ban or forced token, whatever `model.generation_config` holds. It ends at
    every token that ends an answer (`stop_ids`). `processor` makes, from the attention mask of a batch's prompts, what
    changes the logits on purpose. Draws from torch's global random state: call it inside
    `measuring`. The processes of an `accelerator` share out the rows of each batch and all get all samples, the same
    that one process would draw: all of them must call this, from the same random state. Where the weights are shared
    out (FSDP, DeepSpeed) every process draws every row, since none may stop computing before the others do.
    """
    prompts = encode_prompts(tokenizer, [prompt_of(row) for row in rows])
    config = _plain_generation_config(model, tokenizer, max_new_tokens)
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    drawn: dict[int, list[int]] = {}
    longest = max(map(len, prompts), default=0) + max_new_tokens
    batch_size = batch_size or rows_at_once(model, longest)
    with _generation_config(model, config):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = _generate(model, [prompts[i] for i in batch], config, processor, accelerator)
            drawn.update(zip(batch, ids, strict=True))
    return [_sample(tokenizer, rows[i], prompts[i], drawn[i], config) for i in range(len(rows))]


def rows_at_once(model: Any, length: int) -> int:
    """Rows of `length` tokens that are drawn at a time: on a GPU as many as an eighth of its memory holds with their
    keys, values and logits, so that equal cards draw equal samples; fewer where less is free.
    """
    if model.device.type != "cuda":
        return DRAWN_AT_ONCE
    text = model.config.get_text_config()
    row = 2 * text.num_hidden_layers * cache_width(text) * model.dtype.itemsize * length + 12 * text.vocab_size
    free, total = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, min(total // 8, (free + unused) // 2) // row)


def cache_width(text: Any) -> int:
    """Numbers that a layer keeps of a token as keys, and as many as values; the hidden size where it has no heads."""
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return width * (getattr(text, "num_key_value_heads", None) or heads)


def mlp_width(text: Any) -> int:
    """Of the widest MLP of a model with the config `text`."""
    given = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return max(given) if isinstance(given, list | tuple) else given


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's, else EOS, else 0 (padding is masked, so any id does)."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(each for each in ids if each is not None)


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device, side: str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of sequences padded on one `side` ("left" or "right"), both (rows,
    longest).
    """
    rows = [torch.tensor(each, dtype=torch.long) for each in sequences]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def _plain_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,  # `Draw` has drawn
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(tokenizer, model) or None,
        pad_token_id=pad_token_id(tokenizer),
        use_cache=True,  # the trainer switches the model's own off under activation checkpointing
    )


WEIGHTS_SHARED_OUT = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def _generate(
    model: Any,
    prompts: list[list[int]],
    config: GenerationConfig,
    processor: Callable[[Tensor], LogitsProcessor] | None,
    accelerator: Accelerator | None,
) -> list[list[int]]:
    whole = accelerator is not None and accelerator.distributed_type not in WEIGHTS_SHARED_OUT
    place, count = (accelerator.process_index, accelerator.num_processes) if accelerator and whole else (0, 1)
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
    """Shapes logits as `generate` does under `config`: repetition penalty; then greedy, or temperature, top-k, top-p
    and min-p.
    """

    def __init__(self, config: GenerationConfig) -> None:
        penalty, top_k = config.repetition_penalty or 1.0, config.top_k
        self.steps: list[Any] = [RepetitionPenaltyLogitsProcessor(float(penalty))] if penalty != 1 else []
        if not config.do_sample:
            self.steps.append(TopKLogitsWarper(1))
            return
        if config.temperature not in (None, 1):
            self.steps.append(TemperatureLogitsWarper(float(config.temperature)))
        if top_k != 0:
            self.steps.append(TopKLogitsWarper(USUAL_TOP_K if top_k is None else top_k))
        if config.top_p not in (None, 1):
            self.steps.append(TopPLogitsWarper(float(config.top_p)))
        if config.min_p:
            self.steps.append(MinPLogitsWarper(float(config.min_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for step in self.steps:
            scores = step(input_ids, scores)
        return scores


def _sample(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    prompt_ids: list[int],
    drawn: list[int],
    config: GenerationConfig,
) -> Sample:
    eos = set(config.eos_token_id or [])
    end = next((index + 1 for index, token in enumerate(drawn) if token in eos), None)
    token_ids = drawn[:end]
    return Sample(row, prompt_ids, token_ids, decode_answer(tokenizer, token_ids), cut=end is None)


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
    asked = getattr(text, "output_router_logits", False)
    if asked:
        text.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            text.output_router_logits = asked


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
