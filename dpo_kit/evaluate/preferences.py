"""What the implicit reward says of held-out pairs: how often it is right, how sure, and where it goes wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dpo_kit.callbacks import metrics as measures
from dpo_kit.callbacks.scores import Scores, preference_metrics, reward_metrics
from dpo_kit.data.prepare import Rows
from dpo_kit.data.report.figures import scores_of
from dpo_kit.run.statistics import mcnemar, paired_bootstrap

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
    margins, prompts = measures.margin(scores.logratio_chosen, scores.logratio_rejected), scores.prompts_chosen
    tokens = scores.tokens_chosen - scores.tokens_rejected
    ratings = [scores_of(row) for row in rows]
    gaps = [math.nan if rating is None else abs(rating[0] - rating[1]) for rating in ratings]
    values = torch.tensor(gaps, dtype=torch.float64)
    known = values[~values.isnan()]
    by_gap = []  # accuracy in groups of about as many pairs, from the closest calls to the clearest
    if len(known):
        edges = torch.quantile(known, torch.linspace(0, 1, GROUPS + 1, dtype=torch.float64)).unique().tolist()
        for low, high in pairwise(edges if len(edges) > 1 else edges * 2):
            inside = (values >= low) & ((values <= high) if high == edges[-1] else (values < high))  # never for nan
            if inside.any():
                by_gap.append({"from": low, "to": high, **_group(margins, inside, prompts)})
    lengths = {"chosen longer": tokens > 0, "chosen shorter": tokens < 0, "equally long": tokens == 0}
    found["accuracy_length_corrected_logistic"] = found.pop("accuracy_length_corrected", None)
    return {
        "kind": "pairs",
        "pairs": len(rows),
        **found,
        "calibration": None if beta is None else describe_calibration(beta * margins, prompts),
        "by_score_gap": by_gap,
        "by_length": {name: _group(margins, inside, prompts) for name, inside in lengths.items()},
    }


def describe_calibration(rewards: Tensor, prompts: Sequence[str]) -> Found:
    """How far σ(reward margin), the confidence in the answer that it prefers, agrees with how often that is right.

    `reliability`: a row for each tenth of the confidences from ½ to 1 that occurs; `ece`: the mean gap between
    confidence and accuracy, rows weighed by their pairs (expected calibration error, arXiv:1706.04599).
    """
    confidence = torch.sigmoid(rewards.double().abs())
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    rows = []
    for number in place.unique().tolist():
        inside = place == number
        ends = {"from": 0.5 + number / (2 * BINS), "to": 0.5 + (number + 1) / (2 * BINS)}
        rows.append(ends | {"confidence": float(confidence[inside].mean()), **_group(rewards, inside, prompts)})
    gaps = [row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in rows]
    return {
        "ece": sum(gaps) / len(rewards),
        "mean_confidence": float(confidence.mean()),
        "accuracy": measures.accuracy(rewards),
        "reliability": rows,
    }


def compare_preferences(ours: Found, theirs: Found) -> Found:
    """Two policies on the same pairs, ours less theirs; each side is {pair_id: (prompt_id, margin in nats)}.

    Accuracy by McNemar's exact test, margin by paired bootstrap, both by prompt; empty below two common pairs.
    """
    means = []
    for side in (ours, theirs):
        by_prompt: dict[str, list[float]] = {}
        for pair in ours.keys() & theirs.keys():
            prompt, margin = side[pair]
            by_prompt.setdefault(prompt, []).append(margin)
        means.append({prompt: fmean(margins) for prompt, margins in by_prompt.items()})
    tests = {"accuracy": mcnemar(ours, theirs), "margin_nats": paired_bootstrap(means[0], means[1])}
    return {
        name: {"difference": test.value, "low": test.low, "high": test.high, "p": test.p, "count": test.count,
               "test": test.basis, "needed": test.needed}
        for name, test in tests.items() if test is not None
    }  # fmt: skip


def margins_by_pair(scores: Scores, rows: Rows) -> dict[str, tuple[str, float]]:
    """{pair_id: (prompt_id, margin in nats)}; {} for unary rows."""
    if not scores.paired:
        return {}
    margins = measures.margin(scores.logratio_chosen, scores.logratio_rejected).tolist()
    return {row["pair_id"]: (row["prompt_id"], value) for row, value in zip(rows, margins, strict=True)}


def _group(margins: Tensor, inside: Tensor, prompts: Sequence[str]) -> Found:
    """Pairs and accuracy with its interval of those that are `inside`; None where there is none."""
    count = int(inside.sum())
    if not count:
        return {"pairs": 0, "accuracy": None, "low": None, "high": None}
    members = [prompt for prompt, is_inside in zip(prompts, inside.tolist(), strict=True) if is_inside]
    low, high = measures.accuracy_interval(margins[inside], members)
    return {"pairs": count, "accuracy": measures.accuracy(margins[inside]), "low": low, "high": high}
