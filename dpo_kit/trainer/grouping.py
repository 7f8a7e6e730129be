"""Batches of rows of similar length, for models in which padding is computed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

Base: Any = object  # in use, a trainer follows in the method resolution order


class SeededLengthGroups(LengthGroupedSampler):
    """transformers' sampler with an order of its own for every seed and epoch, which a resumed run has again.

    Batches are drawn at random from groups of fifty, and sorted within each; the longest row of all comes first, so
    that a batch that does not fit into memory fails at once.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch + 1):
            seed = int(torch.randint(2**62, (), generator=order))
        self.generator = torch.Generator().manual_seed(seed)
        return super().__iter__()


class GroupedByLength(Base):
    """Mixin before a TRL trainer: batches of similar length; transformers' own way wants a column that TRL lacks."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SeededLengthGroups:
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthGroups(row_lengths(rows), batch, seed)


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row of a dataset that a TRL trainer has prepared, prompt and answers together."""
    columns = [rows[name] for name in rows.column_names if name.endswith("_ids")]
    return [sum(map(len, row)) for row in zip(*columns, strict=True)]
