"""What a trainer must carry over a resume, beside what transformers saves, so that nothing shows that it was stopped.

transformers restores weights, optimizer, scheduler, random state and place in the data. At a resume it starts anew the
loss summed since the last log event, TRL's averages since then, TRL's count of tokens, and the steps that the mean loss
of its last row stands for. A callback carries what it needs by having `carry` and `pick_up`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

COUNTERS = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_global_step",
    "_total_train_tokens",
)
AVERAGES = ("_metrics", "_stored_metrics")  # of DPO and KTO; of ORPO and CPO, under "train"
PLAIN_AVERAGES = ("stats",)  # of Online DPO
Carried = dict[str, Any]


@runtime_checkable
class Carrier(Protocol):
    """A callback that goes on after a resume where it stood."""

    def carry(self) -> dict[str, Any]:
        """Plain values and tensors."""

    def pick_up(self, carried: dict[str, Any]) -> None:
        """Take back what `carry` gave."""


def carry(trainer: Any) -> Carried:
    """The state of `trainer` as plain values and tensors of its own."""
    return {
        "counters": {name: _own(vars(trainer)[name]) for name in COUNTERS if name in vars(trainer)},
        "averages": {name: _lists(values) for name, values in _averages(trainer).items()},
        "callbacks": [callback.carry() for callback in _carriers(trainer)],
        "training": trainer.model.training,
    }


def pick_up(trainer: Any, carried: Carried) -> None:
    """Set `trainer` to what `carry` gave."""
    for name, value in carried["counters"].items():
        setattr(trainer, name, value.to(trainer.args.device) if isinstance(value, Tensor) else value)
    for name, lists in carried["averages"].items():
        _averages(trainer)[name].update(_lists(lists))
    for callback, values in zip(_carriers(trainer), carried["callbacks"], strict=True):
        callback.pick_up(values)
    trainer.model.train(carried["training"])


def _averages(trainer: Any) -> dict[str, dict[str, list[Any]]]:
    own = vars(trainer)
    return {name: own[name]["train"] for name in AVERAGES if name in own} | {
        name: own[name] for name in PLAIN_AVERAGES if name in own
    }


def _carriers(trainer: Any) -> Iterator[Carrier]:
    return (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Carrier))


def _lists(values: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: [_own(each) for each in items] for key, items in values.items()}


def _own(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
