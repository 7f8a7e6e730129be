"""What a trainer must carry over a resume, beside what transformers saves, so that nothing shows that it was stopped.

transformers restores weights, optimizer, scheduler, random state and place in the data. At a resume it starts anew the
loss summed since the last log event, TRL's averages since then, TRL's count of tokens, and the steps that the mean loss
of its last row stands for. A callback carries what it needs by having `carry`, which gives plain values and tensors,
and `pick_up`, which takes them back.
"""

from typing import Any

from torch import Tensor

COUNTERS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "_total_train_tokens")
AVERAGES = ("_metrics", "_stored_metrics")  # of DPO and KTO; of ORPO and CPO, under "train"
PLAIN_AVERAGES = ("stats",)  # of Online DPO


def carry(trainer: Any) -> dict[str, Any]:
    """The state of `trainer` as plain values and tensors of its own."""
    averages = _averages(trainer).items()
    return {
        "counters": {name: _own(vars(trainer)[name]) for name in COUNTERS if name in vars(trainer)},
        "averages": {name: {key: [*map(_own, each)] for key, each in values.items()} for name, values in averages},
        "callbacks": [callback.carry() for callback in _carriers(trainer)],
        "training": trainer.model.training,
    }


def pick_up(trainer: Any, carried: dict[str, Any]) -> None:
    """Set `trainer` to what `carry` gave."""
    for name, value in carried["counters"].items():
        setattr(trainer, name, value.to(trainer.args.device) if isinstance(value, Tensor) else value)
    for name, values in carried["averages"].items():
        _averages(trainer)[name].update({key: [*map(_own, each)] for key, each in values.items()})
    for callback, values in zip(_carriers(trainer), carried["callbacks"], strict=True):
        callback.pick_up(values)
    trainer.model.train(carried["training"])


def _averages(trainer: Any) -> dict[str, dict[str, list[Any]]]:
    own = vars(trainer)
    split = {name: own[name]["train"] for name in AVERAGES if name in own}
    return split | {name: own[name] for name in PLAIN_AVERAGES if name in own}


def _carriers(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "carry")]


def _own(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
