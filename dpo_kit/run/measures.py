"""The measures of a run in one table, and which of them only measure rounding. Standard library only."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A quantity as metrics.jsonl, result.json and wandb have it under `key`, and how people read it.

    label: its row in tables, with the unit. form: its format. short: its name beside a progress bar, where it has one.
    """

    key: str
    label: str
    form: str
    short: str = ""


FLOOR, KL_FLOOR = "probe/floor_nats", "probe/kl_floor_nats"  # what rounding alone makes; not there in float32
MEASURES = (
    Measure("probe/accuracy", "held-out accuracy", ".3f", "accuracy"),
    Measure("probe/auc", "held-out AUC", ".3f", "auc"),
    Measure("probe/margin_nats", "preference margin, nats", ".2f", "margin"),
    Measure("probe/class_gap_nats", "class gap, nats", ".2f", "class gap"),
    Measure("probe/reward_chosen", "implicit reward, chosen", ".2f"),
    Measure("probe/reward_rejected", "implicit reward, rejected", ".2f"),
    Measure("probe/kl_forward_rb_nats", "KL forward, nats per answer", ".2f", "KL"),
    Measure("probe/kl_forward_k1_nats", "KL forward (k1), nats per answer", ".2f", "KL"),
    Measure("probe/kl_reverse_rb_nats", "KL reverse, nats per answer", ".2f"),
    Measure("probe/kl_reverse_k1_nats", "KL reverse (k1), nats per answer", ".2f"),
    Measure(FLOOR, "rounding of an answer, nats", ".3f"),
    Measure(KL_FLOOR, "KL of rounding, nats per answer", ".2g"),
    Measure("gold/reward", "gold reward of fresh samples", ".2f"),
    Measure("gold/capability", "capability, share right", ".3f"),
)  # in the order in which tables show them
LOGRATIOS = {side: f"probe/logratio_{side}_nats" for side in ("chosen", "rejected")}
REWARDS = {f"probe/reward_{side}": key for side, key in LOGRATIOS.items()} | {
    "probe/reward_margin": "probe/margin_nats"
}
OF_A_SIDE = {"probe/displacement": LOGRATIOS["chosen"]} | {
    key: name for side, name in LOGRATIOS.items() for key in (name, f"probe/reward_{side}")
}
OF_BOTH = tuple(
    f"probe/{name}"
    for name in ("accuracy", "auc", "margin_nats", "class_gap_nats", "reward_margin", "saturation", "both_down")
)
CHANCE = {"probe/margin_nats": 0.0, "probe/accuracy": 0.5, "probe/class_gap_nats": 0.0, "probe/auc": 0.5}
HELD_OUT = (
    *(f"{name}{end}" for name in ("accuracy", "auc", "margin_nats", "class_gap_nats") for end in ("", "_low", "_high")),
    "logratio_chosen_nats", "logratio_rejected_nats", "displacement", "both_down", "floor_nats",
)  # fmt: skip  # what an evaluation knows of held-out rows, by the names that result.json has there


def kl_keys(direction: str) -> tuple[str, str]:
    """The keys of the KL per answer, `forward` or `reverse`: Rao-Blackwell (rb), and k1 of the drawn tokens alone."""
    return f"probe/kl_{direction}_rb_nats", f"probe/kl_{direction}_k1_nats"


def kl_key(direction: str, measured: Container[str]) -> str:
    """The key that the KL is read from: rb where it is among the `measured` keys (it costs more), else k1."""
    rb, k1 = kl_keys(direction)
    return rb if rb in measured else k1


def learned(values: Mapping[str, Any]) -> bool | None:
    """Whether an interval of the held-out rows lies above what chance gives; None where none was measured."""
    lows = [(low, chance) for key, chance in CHANCE.items() if (low := values.get(f"{key}_low")) is not None]
    return any(low > chance for low, chance in lows) if lows else None


def moved_nats(values: Mapping[str, Any]) -> float | None:
    """How far held-out answers have moved in the mean, the side that moved further (else their margin)."""
    sides = [value for key in LOGRATIOS.values() if (value := values.get(key)) is not None]
    margin = values.get("probe/margin_nats")
    return max(map(abs, sides or ([] if margin is None else [margin])), default=None)


def in_rounding(key: str, values: Mapping[str, Any]) -> bool:
    """Whether what was measured under `key` is no more than what rounding alone makes; `values` were measured with it.

    A KL is compared with that of rounding; what is told of one side of the held-out answers, with how far rounding
    moves an answer. What is told of both (accuracy, margin, …) is rounding where neither side has moved further and no
    interval lies above chance: over many pairs a difference can be surer than one answer is.
    """
    if key in (*kl_keys("forward"), *kl_keys("reverse")):
        value, floor = values.get(key), values.get(KL_FLOOR)
        return value is not None and floor is not None and value < floor
    floor, side = values.get(FLOOR), values.get(OF_A_SIDE.get(key, ""))
    if not floor:
        return False
    if side is not None:
        return abs(side) < floor
    moved = moved_nats(values)
    return key in OF_BOTH and moved is not None and moved < floor and not learned(values)


def floor_of(key: str, values: Mapping[str, Any]) -> float:
    """What rounding alone makes, in the unit of `key`; 0 in float32, and where no such number is known."""
    if key in (*kl_keys("forward"), *kl_keys("reverse")):
        return values.get(KL_FLOOR) or 0.0
    if key in REWARDS:  # beta times nats
        reward, nats = values.get(key), values.get(REWARDS[key])
        return (values.get(FLOOR) or 0.0) * reward / nats if reward and nats else 0.0
    return (values.get(FLOOR) or 0.0) if key in (*REWARDS.values(), "probe/class_gap_nats") else 0.0


def rounding_text(values: Mapping[str, Any]) -> str:
    """In words that `values` of held-out rows are `in_rounding`."""
    return (
        f"held-out answers have moved by {moved_nats(values):.2g} nats, less than the {values[FLOOR]:.2g} by which "
        "rounding alone moves one"
    )


def as_measured(found: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation found of held-out rows, by the keys that a run has."""
    return {f"probe/{key}": value for key, value in found.items()}
