"""Which measures of a run are no more than what rounding alone makes. Standard library only."""

from collections.abc import Mapping
from typing import Any

from dpo_kit.run.measures import CHANCE, FLOOR, KL_FLOOR, KLS, LOGRATIOS

REWARDS = {"probe/reward_margin": "probe/margin_nats"} | {f"probe/reward_{side}": LOGRATIOS[side] for side in LOGRATIOS}
OF_A_SIDE = {"probe/displacement": LOGRATIOS["chosen"]} | {key: key for key in LOGRATIOS.values()}
OF_A_SIDE |= {f"probe/reward_{side}": key for side, key in LOGRATIOS.items()}
OF_BOTH = (*CHANCE, "probe/reward_margin", "probe/saturation", "probe/both_down")
ESTIMATES = (*KLS["forward"], *KLS["reverse"])


def learned(values: Mapping[str, Any]) -> bool | None:
    """Whether an interval of the held-out rows lies above what chance gives; None where none was measured."""
    above = [low > chance for key, chance in CHANCE.items() if (low := values.get(f"{key}_low")) is not None]
    return any(above) if above else None


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
    if key in ESTIMATES:
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
    floor, nats = values.get(FLOOR) or 0.0, values.get(REWARDS.get(key, ""))
    if key in ESTIMATES:
        return values.get(KL_FLOOR) or 0.0
    if key in REWARDS:  # beta times nats
        reward = values.get(key)
        return floor * reward / nats if reward and nats else 0.0
    return floor if key in (*REWARDS.values(), "probe/class_gap_nats") else 0.0


def rounding_text(values: Mapping[str, Any]) -> str:
    """In words that `values` of held-out rows are `in_rounding`."""
    return (
        f"held-out answers have moved by {moved_nats(values):.2g} nats, less than the {values[FLOOR]:.2g} by which "
        "rounding alone moves one"
    )
