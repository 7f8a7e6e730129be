"""What the implicit reward says of held-out pairs: how often it is right, how sure, and where it goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dpo_kit.callbacks import metrics as measures
from dpo_kit.callbacks.scores import Scores, preference_metrics, reward_metrics
from dpo_kit.data.prepare import Rows
from dpo_kit.data.report.figures import scores_of
from dpo_kit.run.statistics import Difference, mcnemar, paired_bootstrap

GROUPS = 4  # of pairs by score gap
BINS = 10  # of the reliability table, over confidences from ½ to 1
Found = dict[str, Any]


def describe_preferences(scores: Scores, rows: Rows, beta: float | None, saturation: str | None) -> Found:
    """All that `scores` say of `rows` (those scored, in their order): nats, shares, 95 % intervals.

    Pairs: accuracy (Wilson on as many pairs as are effectively independent, prompts as clusters), margin (bootstrap by
    prompt), displacement, and accuracy in groups; calibration where `beta` makes a reward of the margin. Unary rows:
    AUC and class gap.
    """
    plain = preference_metrics(scores, beta, saturation) | reward_metrics(scores, beta)
    found: Found = {name.removeprefix("probe/"): value for name, value in plain.items()}
    found["prompts"] = len({*scores.prompts_chosen, *scores.prompts_rejected})
    if not scores.paired:
        return {"kind": "unary", "rows": len(rows), **found}
    margins = measures.margin(scores.logratio_chosen, scores.logratio_rejected)
    found["accuracy_length_corrected_logistic"] = found.pop("accuracy_length_corrected", None)
    ratings = [scores_of(row) for row in rows]
    gaps = [None if rating is None else rating[0] - rating[1] for rating in ratings]
    tokens = scores.tokens_chosen - scores.tokens_rejected
    return {
        "kind": "pairs",
        "pairs": len(rows),
        **found,
        "calibration": describe_calibration(beta * margins, scores.prompts_chosen) if beta is not None else None,
        "by_score_gap": _by_score_gap(margins, gaps, scores.prompts_chosen),
        "by_length": {
            name: _group(margins, chosen, scores.prompts_chosen)
            for name, chosen in (
                ("chosen longer", tokens > 0), ("chosen shorter", tokens < 0), ("equally long", tokens == 0)
            )
        },
    }  # fmt: skip


def describe_calibration(rewards: Tensor, prompts: Sequence[str]) -> Found:
    """How far σ(reward margin), the confidence in the answer that it prefers, agrees with how often that is right.

    `reliability`: a row for each tenth of the confidences from ½ to 1 that occurs; `ece`: the mean gap between
    confidence and accuracy, rows weighed by their pairs (expected calibration error, arXiv:1706.04599).
    """
    confidence = torch.sigmoid(rewards.double().abs())
    right = measures.correct(rewards)
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    rows = []
    for bin_ in sorted(set(place.tolist())):
        inside = place == bin_
        rows.append(
            {
                "from": 0.5 + bin_ / (2 * BINS),
                "to": 0.5 + (bin_ + 1) / (2 * BINS),
                "confidence": float(confidence[inside].mean()),
                **_group(rewards, inside, prompts),
            }
        )
    gaps = [row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in rows]
    return {
        "ece": sum(gaps) / len(rewards),
        "mean_confidence": float(confidence.mean()),
        "accuracy": float(right.mean()),
        "reliability": rows,
    }


def compare_preferences(ours: Found, theirs: Found) -> Found:
    """Two policies on the same pairs, ours less theirs; each side is {pair_id: (prompt_id, margin in nats)}.

    Accuracy by McNemar's exact test, margin by paired bootstrap, both by prompt; empty below two common pairs.
    """
    common = ours.keys() & theirs.keys()
    mine, other = (_mean_by_prompt({pair: side[pair] for pair in common}) for side in (ours, theirs))
    tests = {"accuracy": mcnemar(ours, theirs), "margin_nats": paired_bootstrap(mine, other)}
    return {name: _describe(test) for name, test in tests.items() if test is not None}


def margins_by_pair(scores: Scores, rows: Rows) -> dict[str, tuple[str, float]]:
    """{pair_id: (prompt_id, margin in nats)}; {} for unary rows."""
    if not scores.paired:
        return {}
    margins = measures.margin(scores.logratio_chosen, scores.logratio_rejected).tolist()
    return {row["pair_id"]: (row["prompt_id"], value) for row, value in zip(rows, margins, strict=True)}


def _mean_by_prompt(pairs: dict[str, tuple[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for prompt, value in pairs.values():
        values.setdefault(prompt, []).append(value)
    return {prompt: sum(each) / len(each) for prompt, each in values.items()}


def _describe(test: Difference) -> Found:
    return {
        "difference": test.value, "low": test.low, "high": test.high, "p": test.p, "count": test.count,
        "test": test.basis, "needed": test.needed,
    }  # fmt: skip


def _by_score_gap(margins: Tensor, gaps: Sequence[float | None], prompts: Sequence[str]) -> list[Found]:
    """Accuracy in groups of about as many pairs, from the closest calls to the clearest; [] without scores."""
    known = torch.tensor([gap is not None for gap in gaps])
    values = torch.tensor([abs(gap) if gap is not None else 0.0 for gap in gaps], dtype=torch.float64)
    if not known.any():
        return []
    quantiles = torch.linspace(0, 1, GROUPS + 1, dtype=torch.float64)
    edges = torch.quantile(values[known], quantiles).unique().tolist()
    edges = edges if len(edges) > 1 else edges * 2
    found = []
    for low, high in pairwise(edges):
        last = high == edges[-1]
        inside = known & (values >= low) & ((values <= high) if last else (values < high))
        if inside.any():
            found.append({"from": low, "to": high, **_group(margins, inside, prompts)})
    return found


def _group(margins: Tensor, inside: Tensor, prompts: Sequence[str]) -> Found:
    """Pairs and accuracy with its interval of those that are `inside`; None where there is none."""
    count = int(inside.sum())
    if not count:
        return {"pairs": 0, "accuracy": None, "low": None, "high": None}
    own = [prompt for prompt, here in zip(prompts, inside.tolist(), strict=True) if here]
    low, high = measures.accuracy_interval(margins[inside], own)
    return {"pairs": count, "accuracy": measures.accuracy(margins[inside]), "low": low, "high": high}
