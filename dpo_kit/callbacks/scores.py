"""What one scoring of the probe says: logratios row by row, and the metrics drawn from them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kit.callbacks import metrics as measures

Metrics = dict[str, float]


@dataclass(frozen=True)
class Scores:
    """Logratios (nats, float64) of the probe's rows at one step, lengths in tokens, and prompts for clustering.

    Paired rows: element i of each field is pair i. Unary rows (`paired` false): `chosen` holds the desirable
    completions and `rejected` the undesirable ones, which do not correspond.
    """

    step: int
    paired: bool
    logratio_chosen: Tensor
    logratio_rejected: Tensor
    tokens_chosen: Tensor
    tokens_rejected: Tensor
    prompts_chosen: list[str]
    prompts_rejected: list[str]
    floor_nats: float = 0.0  # what rounding alone does to an answer: root mean square of its log-probability


def preference_metrics(scores: Scores, beta: float | None, saturation: str | None) -> Metrics:
    """What the implicit reward says of held-out rows, as metrics under "probe/" (nats; intervals are 95 %).

    Pairs: accuracy, margin, calibration, length. Unary rows: AUC and the gap between the classes. `beta` None leaves
    out what is scaled by it; `saturation` is a key of `metrics.SATURATION` or None.
    """
    chosen, rejected = scores.logratio_chosen, scores.logratio_rejected
    floor = {"probe/floor_nats": scores.floor_nats} if scores.floor_nats else {}
    if not scores.paired:
        both, labels = torch.cat([chosen, rejected]), torch.tensor([True] * len(chosen) + [False] * len(rejected))
        prompts = scores.prompts_chosen + scores.prompts_rejected
        return {
            "probe/auc": measures.auc(chosen, rejected),
            **_interval("probe/auc", measures.auc_interval(both, labels, prompts)),
            "probe/class_gap_nats": measures.class_gap(chosen, rejected),
            **_interval("probe/class_gap_nats", measures.class_gap_interval(both, labels, prompts)),
            **floor,
        }
    margins = measures.margin(chosen, rejected)
    ends = measures.bootstrap_interval(margins, scores.prompts_chosen)
    gaps = (scores.tokens_chosen - scores.tokens_rejected).double()
    of_length = {
        "probe/length_rule_accuracy": measures.longer_wins(scores.tokens_chosen, scores.tokens_rejected),
        "probe/accuracy_chosen_shorter": measures.accuracy(margins[gaps < 0]),
        "probe/accuracy_length_corrected": measures.length_corrected_accuracy(margins, gaps),
        "probe/margin_length_spearman": measures.spearman(margins, gaps),
    }
    values = {
        **_interval("probe/accuracy", measures.accuracy_interval(margins, scores.prompts_chosen)),
        "probe/accuracy": measures.accuracy(margins),
        "probe/margin_nats": float(margins.mean()),
        **_interval("probe/margin_nats", ends),
        # undefined where no chosen is the shorter, or where all margins are equal, as at step 0
        **{name: value for name, value in of_length.items() if not math.isnan(value)},
        **floor,
    }
    if beta is not None:
        rewards = measures.implicit_reward(margins, beta)
        log_loss, brier = measures.log_loss_and_brier(rewards)
        values |= {
            "probe/reward_margin": float(rewards.mean()),
            **_interval("probe/reward_margin", (beta * ends[0], beta * ends[1])),
            "probe/log_loss": log_loss,
            "probe/brier": brier,
        }
        if saturation is not None:
            per_token = chosen / scores.tokens_chosen - rejected / scores.tokens_rejected
            values["probe/saturation"] = measures.SATURATION[saturation](margins, per_token, beta)
    return values


def reward_metrics(scores: Scores, beta: float | None) -> Metrics:
    """Mean logratios (nats) and, where `beta` is given, implicit rewards of chosen and rejected, each with its 95 %
    interval (bootstrap by prompt), and displacement.
    """
    values = {}
    for side in ("chosen", "rejected"):
        logratios, prompts = getattr(scores, f"logratio_{side}"), getattr(scores, f"prompts_{side}")
        ends = (float(logratios.mean()), *measures.bootstrap_interval(logratios, prompts))
        for end, value in zip(("", "_low", "_high"), ends, strict=True):
            values[f"probe/logratio_{side}_nats{end}"] = value
            if beta is not None:
                values[f"probe/reward_{side}{end}"] = beta * value
    values["probe/displacement"] = float((scores.logratio_chosen < 0).double().mean())
    if scores.paired:
        _, values["probe/both_down"] = measures.displacement(scores.logratio_chosen, scores.logratio_rejected)
    return values


def _interval(name: str, bounds: tuple[float, float]) -> Metrics:
    return {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
