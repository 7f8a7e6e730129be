"""Rows of similar length in a batch: every row once an epoch, in an order that a resumed run has again."""

import random

import pytest

from dpo_kit.trainer.grouping import GroupedByLength, SeededLengthGroups, row_lengths
from tests import tiny


def padded_slots(order, lengths, batch):
    return sum(batch * max(lengths[i] for i in order[at : at + batch]) for at in range(0, len(order), batch))


def test_every_row_comes_once_an_epoch_with_much_less_padding_and_the_longest_first():
    draw = random.Random(2)
    lengths = [round(100 * draw.lognormvariate(0, 0.6)) for _ in range(800)]
    sampler = SeededLengthGroups(lengths, 8, seed=4)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(800))
    assert epochs[0] == epochs[2] != epochs[1]
    assert list(SeededLengthGroups(lengths, 8, seed=5)) != epochs[0]
    assert lengths[epochs[0][0]] == max(lengths)
    assert padded_slots(epochs[0], lengths, 8) < 1.1 * sum(lengths) < 0.7 * padded_slots(list(range(800)), lengths, 8)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "cpo"])
def test_a_trainer_s_batches_follow_it_and_a_new_one_goes_on_with_the_same_epoch(kind, tmp_path):
    folder = tiny.saved_model(tmp_path / "model")

    def epochs(*which):
        trainer = tiny.trainer(kind, folder, tmp_path / kind, rows=tiny.pairs(40), mixins=[GroupedByLength])
        loader = trainer.get_train_dataloader()
        found = []
        for epoch in which:
            loader.set_epoch(epoch)
            found.append([str(batch) for batch in loader])
        return found, trainer

    (first, second), trainer = epochs(0, 1)
    (again,), _ = epochs(1)
    assert again == second != first and len(first) == 10
    lengths = row_lengths(trainer.train_dataset)
    order = list(trainer.get_train_dataloader().batch_sampler.sampler)
    assert padded_slots(order, lengths, 4) < padded_slots(list(range(40)), lengths, 4)
