"""The command to type next: what was typed, with some keys changed."""

import pytest

from dpo_kit.config import check, compose
from dpo_kit.finish import next_command
from dpo_kit.words import again, longer

TYPED = "python -m dpo_kit method=ipo 'data.train=my pairs.jsonl' beta=0.1 trl.num_train_epochs=3 hydra.run.dir=here"


def saturation(*values):
    return [{"step": step, "probe/saturation": value} for step, value in enumerate(values)]


def test_what_was_typed_comes_back_with_the_changed_keys():
    assert again(TYPED, "ipo", "-m", beta="0.1,0.5", seed="0,1") == (
        "python -m dpo_kit -m method=ipo 'data.train=my pairs.jsonl' trl.num_train_epochs=3 beta=0.1,0.5 seed=0,1"
    )
    assert again(None, "kto", seed="1") == "python -m dpo_kit method=kto seed=1"  # from Python nothing was typed


@pytest.mark.parametrize(
    ("trl", "override"),
    [
        ({"max_steps": 150, "num_train_epochs": 1}, {"trl.max_steps": "300"}),
        ({"max_steps": -1, "num_train_epochs": 1.5}, {"trl.num_train_epochs": "3"}),
        ({}, {"trl.num_train_epochs": "2"}),
    ],
)
def test_twice_as_long_counts_steps_where_they_are_set(trl, override):
    assert longer(trl) == override


def test_no_sweep_is_named_where_beta_is_not_felt():
    settings = check(compose(["method=ipo", "trl.num_train_epochs=3"]))
    grid = ",".join(f"{value:g}" for value in settings.method.beta.grid)
    kept = "method=ipo 'data.train=my pairs.jsonl'"
    felt = next_command(settings, TYPED, saturation(0.0, 0.3))
    assert felt == f"python -m dpo_kit -m {kept} trl.num_train_epochs=3 beta={grid}"
    unfelt = next_command(settings, TYPED, saturation(0.0, 0.02))
    assert unfelt == f"python -m dpo_kit {kept} beta=0.1 trl.num_train_epochs=6"
