"""Log-probabilities as the loss of a trainer reads them, and as the columns of TRL's datasets hold the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor

from dpo_kit.model.batches import pad_token_id
from dpo_kit.model.head import Tokens
from dpo_kit.model.scoring import measured_terms, score, trained_terms
from dpo_kit.model.tokens import truncate_both
from dpo_kit.model.trl_classes import uses_fused_head

COLUMNS = {
    "chosen_ids": "ref_chosen_logps",
    "rejected_ids": "ref_rejected_logps",
    "completion_ids": "ref_logps",
    "KL_completion_ids": "ref_KL_logps",
}
"""The reference's columns in TRL's datasets, by the column of token ids that each belongs to."""


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
    answers = [column for column in COLUMNS if column in dataset.column_names]
    rows = [_cut(trainer.args, dataset["prompt_ids"], dataset[column]) for column in answers]
    ld_alpha = getattr(trainer, "ld_alpha", None)
    heads = [_heads(own, rows) for own in rows] if ld_alpha is not None else []
    parts = scorer([tokens for part in (*rows, *heads) for tokens in part]).view(-1, len(dataset))
    if ld_alpha is not None:
        parts = ld_alpha * parts[: len(rows)] + (1 - ld_alpha) * parts[len(rows) :]
    return {COLUMNS[column]: values for column, values in zip(answers, parts, strict=True)}


def _cut(args: Any, prompts: Iterable[list[int]], answers: Iterable[list[int]]) -> list[Tokens]:
    mode = getattr(args, "truncation_mode", "keep_start")
    return [truncate_both(*each, args.max_length, mode) for each in zip(prompts, answers, strict=True)]


def _heads(own: list[Tokens], rows: list[list[Tokens]]) -> list[Tokens]:
    """Each answer cut to the length that all answers of its row share (LD-DPO, arXiv:2409.06411, eq. 10)."""
    shared = [min(_scored(tokens) for tokens in row) for row in zip(*rows, strict=True)]
    return [(prompt, answer[: length + (not prompt)]) for (prompt, answer), length in zip(own, shared, strict=True)]


def _scored(tokens: Tokens) -> int:
    """Completion tokens that have a prediction: all but the first where nothing stands before it."""
    prompt, answer = tokens
    return len(answer) - (not prompt)
