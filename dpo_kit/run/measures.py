"""The measures of a run in one table: key, label with its unit, format. Standard library only."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A quantity as metrics.jsonl, result.json and wandb have it under `key`, and how people read it.

    label: its row in tables, with the unit. form: its format. short: its name beside a progress bar, where it has one.
    """

    key: str
    label: str
    form: str
    short: str = ""


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
    Measure("probe/floor_nats", "rounding alone moves an answer by, nats", ".3f"),
    Measure("probe/kl_floor_nats", "KL of rounding alone, nats per answer", ".2g"),
    Measure("gold/reward", "gold reward of fresh samples", ".2f"),
    Measure("gold/capability", "capability, share right", ".3f"),
)  # in the order in which tables show them


def kl_keys(direction: str) -> tuple[str, str]:
    """The keys of the KL per answer, `forward` or `reverse`: Rao-Blackwell (rb), and k1 of the drawn tokens alone."""
    return f"probe/kl_{direction}_rb_nats", f"probe/kl_{direction}_k1_nats"


def kl_key(direction: str, measured: Container[str]) -> str:
    """The key that the KL is read from: rb where it is among the `measured` keys (it costs more), else k1."""
    rb, k1 = kl_keys(direction)
    return rb if rb in measured else k1
