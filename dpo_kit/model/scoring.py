"""Log-probabilities of completions under the policy and the reference, in batches that fit."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer

from dpo_kit.errors import ModelError
from dpo_kit.model.batches import mlp_width, pad_batch, pad_token_id
from dpo_kit.model.head import Tokens, read_head
from dpo_kit.model.tokens import Truncation

TOKENS_PER_BATCH = 8192  # on a CPU, and on a GPU with little room
MOST_TOKENS = 65_536  # on a GPU, which more at once would not make faster
LOGITS_BYTES = 2**29  # of a batch whose logits the model makes all at once
COLUMNS = {
    "chosen_ids": "ref_chosen_logps",
    "rejected_ids": "ref_rejected_logps",
    "completion_ids": "ref_logps",
    "KL_completion_ids": "ref_KL_logps",
}
"""The reference's columns in TRL's datasets, by the column of token ids that each belongs to."""


def length_sorted_batches(sequences: Sequence[Tokens], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each at most `tokens_per_batch` padded tokens or one row."""
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def twin_batches(sequences: Sequence[Tokens], tokens_per_batch: int) -> list[list[int]]:
    """As `length_sorted_batches`, with two answers to one prompt half a batch apart, where `prefix.py` computes their
    prompt once; sequences without a twin have batches of their own.
    """
    waiting: dict[tuple[int, ...], int] = {}
    twins: list[tuple[int, int]] = []
    for index, (prompt, _) in enumerate(sequences):
        if (other := waiting.pop(tuple(prompt), None)) is None:
            waiting[tuple(prompt)] = index
        else:
            twins.append((other, index))
    longer = [max((sequences[index] for index in pair), key=lambda tokens: len(tokens[1])) for pair in twins]
    pairs = length_sorted_batches(longer, tokens_per_batch // 2)
    alone = list(waiting.values())
    rest = length_sorted_batches([sequences[index] for index in alone], tokens_per_batch)
    halves = [[twins[place][side] for side in (0, 1) for place in batch] for batch in pairs]
    return [*halves, *([alone[place] for place in batch] for batch in rest)]


def batch_size_in_tokens(model: Any) -> int:
    """Tokens, padding in, that a forward pass without gradients takes at once: by the memory that is free on a GPU.

    Fewer where the model makes the logits of all completion tokens at once and its vocabulary is large.
    """
    text, tokens = model.config.get_text_config(), TOKENS_PER_BATCH
    if model.device.type == "cuda":
        token_bytes = 4 * (10 * text.hidden_size + 3 * mlp_width(text))  # of a layer: the most that lives at a time
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        room = (torch.cuda.mem_get_info(model.device)[0] + unused) // 2
        tokens = max(tokens, min(MOST_TOKENS, room // token_bytes))
    if read_head(model) is None:
        tokens = min(tokens, LOGITS_BYTES // (4 * text.vocab_size))
    return max(1, tokens)


def score(
    model: Any,
    sequences: Sequence[Tokens],
    *,
    pad_id: int,
    tokens_per_batch: int | None = None,
    description: str | None = None,
    accelerator: Accelerator | None = None,
    terms: Callable[[Any, Sequence[Tokens], int], tuple[Tensor, list[int]]] | None = None,
) -> Tensor:
    """Summed completion log-probability of each sequence (EOS in), in nats: (sequences,), float64.

    Plain sums as in DPO's and KTO's loss; call inside `measuring`. `terms` gives what `measured_terms` does. With a
    `description` a terminal shows a bar. The processes of an `accelerator` take turns at the very batches that one
    would take, so that the values are the same; all of them must call this, and all get every value.
    """
    logps = torch.zeros(len(sequences), dtype=torch.float64)
    batches = twin_batches(sequences, tokens_per_batch or batch_size_in_tokens(model))
    turns = take_turns(batches, accelerator)
    for indices, counts in tqdm(turns, description, disable=not (description and sys.stderr.isatty()), leave=False):
        values, lengths = (terms or measured_terms)(model, [sequences[index] for index in indices], pad_id)
        if counts:
            logps[indices] = torch.stack([part.sum() for part in values.double().split(lengths)])
    return add_up(logps, accelerator)


def measured_terms(model: Any, batch: Sequence[Tokens], pad_id: int) -> tuple[Tensor, list[int]]:
    """Log-probability of each completion token, by the head in fp32; and how many belong to each row."""
    from dpo_kit.model.predicted import completion_targets, predict, token_logps

    targets, lengths = completion_targets(batch)
    return token_logps(predict(model, batch, pad_id), targets), lengths


def trained_terms(model: Any, batch: Sequence[Tokens], pad_id: int) -> tuple[Tensor, list[int]]:
    """The same as TRL's loss reads it, by the fused LM head that its trainer has given `model`."""
    rows = [[*prompt, *completion] for prompt, completion in batch]
    ids, attention = pad_batch(rows, pad_id, model.device, "right")
    places = torch.arange(ids.shape[1])
    starts = torch.tensor([max(1, len(prompt)) for prompt, _ in batch])
    lengths = torch.tensor([len(row) for row in rows])
    scored = ((places >= starts[:, None]) & (places < lengths[:, None])).to(ids.device)
    labels = ids.masked_fill(~scored, -100)
    logps = model(input_ids=ids, attention_mask=attention, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    return logps[:, -ids.shape[1] + 1 :][scored[:, 1:]].cpu(), (lengths - starts).tolist()


def take_turns(batches: list[list[int]], accelerator: Accelerator | None) -> list[tuple[list[int], bool]]:
    """The batches of this process, of several that take turns; each with whether it counts.

    As many for each process, since their weights may be shared out: one that has nothing left repeats the last batch.
    """
    place, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    turns = [first + place for first in range(0, len(batches), count)]
    return [(batches[min(turn, len(batches) - 1)], turn < len(batches)) for turn in turns]


def add_up(values: Tensor, accelerator: Accelerator | None) -> Tensor:
    """Over all processes; exact where each value comes from one of them and is zero in the others."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    total: Any = accelerator.reduce(values.to(accelerator.device), "sum")
    return total.cpu()


def uses_fused_head(trainer: type) -> bool:
    """Whether log-probabilities come from hidden states and the LM head's weights, without logits of every position:
    TRL's `add_fused_lm_head` gives a model that forward, and stands in the module of each trainer that uses it.
    """
    homes = {each.__module__ for each in trainer.__mro__ if each.__module__.startswith("trl.")}
    return any(hasattr(sys.modules[home], "add_fused_lm_head") for home in homes)


def score_as_trained(trainer: Any, model: Any, sequences: Sequence[Tokens], description: str | None = None) -> Tensor:
    """Summed completion log-probability of each sequence as the loss of `trainer` reads it: (sequences,), nats.

    Where its trainer has given `model` a fused LM head, by that: a term of the loss is rounded as the other one is.
    """
    terms = trained_terms if uses_fused_head(type(trainer)) else measured_terms
    pad_id = pad_token_id(trainer.processing_class)
    return score(model, sequences, pad_id=pad_id, description=description, terms=terms)


def column_logps(trainer: Any, dataset: Dataset, scorer: Callable[[Sequence[Tokens]], Tensor]) -> dict[str, Tensor]:
    """What TRL's columns of the reference hold for `dataset` where `scorer` gives each sequence's log-probability.

    {column: (rows,) in nats}; empty for datasets of trainers without a reference.
    """
    cut = Truncation.of(trainer.args).cut
    answers = [column for column in COLUMNS if column in dataset.column_names]
    columns = [[cut(*row) for row in zip(dataset["prompt_ids"], dataset[name], strict=True)] for name in answers]
    ld_alpha, heads = getattr(trainer, "ld_alpha", None), []
    # LD-DPO (arXiv:2409.06411, eq. 10): each answer cut to the length that all of its row share
    if ld_alpha is not None:
        for row in zip(*columns, strict=True):  # a first token with nothing before it has no prediction
            shared = min(len(answer) - (not prompt) for prompt, answer in row)
            heads.append([(prompt, answer[: shared + (not prompt)]) for prompt, answer in row])
    every = [*columns, *zip(*heads, strict=True)]
    parts = scorer([tokens for column in every for tokens in column]).view(-1, len(dataset))
    if ld_alpha is not None:
        parts = ld_alpha * parts[: len(columns)] + (1 - ld_alpha) * parts[len(columns) :]
    return {COLUMNS[column]: values for column, values in zip(answers, parts, strict=True)}


class ReferenceModel:
    """The model that the policy is compared with: the one training started from, or another given on purpose.

    Where it comes from, in this order: `model`; a PEFT policy with its adapter off (or TRL's copy named "ref");
    `trainer.ref_model`; else the policy itself while it is untrained. `is_start=False`: `model` is not the start model
    on purpose, and need not equal the policy at step 0.
    """

    def __init__(self, trainer: Trainer, *, model: Any | None = None, is_start: bool = True) -> None:
        self.trainer, self.is_start, self._given = trainer, is_start, model is not None
        self._policy: Any = trainer.model
        self._model = model if self._given else getattr(trainer, "ref_model", None)
        self._is_adapter = self._model is None and is_peft_model(trainer.model)

    @property
    def models(self) -> list[Any]:
        """The reference's own weights, where it has any beside the policy's."""
        return [] if self._model is None else [self._model]

    @contextmanager
    def active(self) -> Iterator[Any]:
        """A model that answers as the reference does, to be used inside the block. At step 0, or while `live`."""
        if self.models or not self._is_adapter:
            yield (self.models or [self._policy])[-1]
            return
        from trl.trainer.utils import use_adapter

        with use_adapter(self._policy, "ref" if "ref" in self._policy.peft_config else None):
            yield self._policy

    def check_start(self, logratios: Tensor, tokens: Tensor, *, as_trained: bool = False) -> float:
        """The largest |policy − reference| in nats at step 0; ModelError where it shows another reference.

        Limits: 1e-3 nats a sequence in fp32, .01 nats a token otherwise (padding and rounding stay below). Shapes
        (sequences,) twice; `as_trained` as in `measuring`.
        """
        largest = float(logratios.abs().max())
        if self.is_start and not self.agrees(logratios, tokens, as_trained=as_trained):
            limit = "1e-3 nats a sequence (fp32)" if self.is_fp32(as_trained) else ".01 nats a token"
            raise ModelError(
                f"reference: at step 0 it must give the same log-probabilities as the policy, within {limit}, but they "
                f"differ by up to {largest:.3g} nats, so drift and rewards would be measured from another model than "
                "the one training starts from. Usual causes: a policy edited, merged or resized in memory while the "
                "reference is loaded from its path (pass ref_model), an adapter that does not start at zero, NaN "
                "weights. If another reference is meant, say so: Reference(trainer, model=..., is_start=False)."
            )
        return largest

    def agrees(self, differences: Tensor, tokens: Tensor, *, as_trained: bool = False) -> bool:
        """Whether log-probabilities that differ by so many nats may come from the same model; shapes (sequences,)."""
        limit = torch.full_like(differences, 1e-3) if self.is_fp32(as_trained) else 0.01 * tokens
        return bool((differences.abs() <= limit).all())

    def is_fp32(self, as_trained: bool = False) -> bool:
        """Whether policy and reference compute in fp32 inside `measuring`."""
        plain = not as_trained or self.trainer.accelerator.mixed_precision == "no"
        weights = (p for model in [self._policy, *self.models] for p in model.parameters())
        return plain and all(p.dtype == torch.float32 for p in weights)
