"""The measures of a run in one table. Standard library only."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A quantity as metrics.jsonl, result.json and wandb have it under `key`, and how people read it."""

    key: str
    label: str  # in the tables of a run and of an evaluation, before its unit; "": it has no row there
    unit: str = ""
    form: str = ".2f"
    short: str = ""  # where a table is narrow, or says the rest above
    bar: str = ""  # beside a progress bar
    title: str = ""  # in pictures

    @property
    def row(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def column(self) -> str:
        """The short name with its unit."""
        return f"{self.short}, nats" if self.short and self.unit.startswith("nats") else self.short


FLOOR, KL_FLOOR = "probe/floor_nats", "probe/kl_floor_nats"  # what rounding alone makes; not there in float32
PER_ANSWER, DRIFT = "nats per answer", "KL drift (nats per answer)"
REWARD, RATIO = "Implicit reward, β·log-ratio (nats)", "Log-ratio to the reference (nats)"
MEASURES = (
    Measure("probe/accuracy", "held-out accuracy", "", ".3f", "accuracy", "accuracy", "Accuracy on held-out pairs"),
    Measure("probe/auc", "held-out AUC", "", ".3f", "AUC", "auc", "AUC on held-out answers"),
    Measure("probe/margin_nats", "preference margin", "nats", ".2f", "margin", "margin", "Preference margin (nats)"),
    Measure("probe/class_gap_nats", "class gap", "nats", ".2f", "", "class gap", "Class gap of log-ratios (nats)"),
    Measure("probe/reward_chosen", "implicit reward, chosen", title=REWARD),
    Measure("probe/reward_rejected", "implicit reward, rejected", title=REWARD),
    Measure("probe/logratio_chosen_nats", "", title=RATIO),
    Measure("probe/logratio_rejected_nats", "", title=RATIO),
    Measure("probe/kl_forward_rb_nats", "KL forward", PER_ANSWER, ".2f", "KL forward", "KL", DRIFT),
    Measure("probe/kl_forward_k1_nats", "KL forward (k1)", PER_ANSWER, ".2f", "KL forward", "KL", DRIFT),
    Measure("probe/kl_reverse_rb_nats", "KL reverse", PER_ANSWER, ".2f", "KL reverse", "", DRIFT),
    Measure("probe/kl_reverse_k1_nats", "KL reverse (k1)", PER_ANSWER, ".2f", "KL reverse", "", DRIFT),
    Measure("probe/displacement", "", short="displaced"),
    Measure("held_out_rows", "", "", ".0f", "held-out rows"),
    Measure(FLOOR, "rounding of an answer", "nats", ".3f", "rounding of an answer"),
    Measure(KL_FLOOR, "KL of rounding", PER_ANSWER, ".2g", "KL of rounding"),
    Measure("probe/sample_tokens", "", "", ".1f", "tokens"),
    Measure("gold/reward", "gold reward of fresh samples", short="gold reward", title="Gold reward of fresh samples"),
    Measure("win_rate", "win rate, ties counting half", "", ".3f", "win rate", "", "win rate"),
    Measure("win_rate_without_ties", "win rate without ties", "", ".3f", "… with ties dropped", "", "ties dropped"),
    Measure("win_rate_length_controlled_without_difficulty", "win rate at equal length", "", ".3f",
            "… at equal length (instruction difficulty left out)", "", "at equal length"),
    Measure("win_rate_corrected", "win rate put right by people", "", ".3f",
            "… put right by people's votes", "", "put right by people"),
    Measure("gold/capability", "capability", "share right", ".3f", "capability", "", "Capability (share right)"),
    Measure("probe/saturation", "", short="saturation"),
    Measure("seconds", "", "", ".0f", "seconds"),
)  # fmt: skip  # in the order in which tables show them
MEASURE = {measure.key: measure for measure in MEASURES}
WIN_RATES = tuple(key for key in MEASURE if key.startswith("win_rate"))
LOGRATIOS = {side: f"probe/logratio_{side}_nats" for side in ("chosen", "rejected")}
CHANCE = {"probe/accuracy": 0.5, "probe/auc": 0.5, "probe/margin_nats": 0.0, "probe/class_gap_nats": 0.0}
HELD_OUT = (
    *(f"{key.removeprefix('probe/')}{end}" for key in CHANCE for end in ("", "_low", "_high")),
    "logratio_chosen_nats", "logratio_rejected_nats", "displacement", "both_down", "floor_nats",
)  # fmt: skip  # what an evaluation knows of held-out rows, by the names that result.json has there
# the keys of the KL per answer: Rao-Blackwell (rb), and k1 of the drawn tokens alone
KLS = {way: (f"probe/kl_{way}_rb_nats", f"probe/kl_{way}_k1_nats") for way in ("forward", "reverse")}


def win_rate_key(judged: Mapping[str, Any]) -> str:
    """The key that a win rate is read from: what people put right where they did, else the judge's own."""
    return "win_rate" if judged.get("win_rate_corrected") is None else "win_rate_corrected"


def kl_key(direction: str, measured: Container[str]) -> str:
    """The key that the KL is read from: rb where it is among the `measured` keys (it costs more), else k1."""
    rb, k1 = KLS[direction]
    return rb if rb in measured else k1


def as_measured(found: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation found of held-out rows, by the keys that a run has."""
    return {f"probe/{key}": value for key, value in found.items()}
