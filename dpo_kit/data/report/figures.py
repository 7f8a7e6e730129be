"""What the columns of the rows say: lengths, rater agreement, score gaps, sources, classes. Pure functions of rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_kit.data.rows import ANSWERS, Kind

Rows = list[dict[str, Any]]
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
SOURCES = ("source", "dataset", "subset", "category", "domain", "task", "topic", "language", "chosen_model")
USUAL = (10_000, 100_000)
ENOUGH = 5_000


def lengths(rows: Rows, kind: Kind) -> dict[str, Any]:
    """Token counts of each column, and how many rows `max_length` cuts."""
    return {
        "cut_at_max_length": sum(row["tokens"]["cut"] for row in rows),
        "tokens": {name: spread([row["tokens"][name] for row in rows]) for name in ("prompt", *ANSWERS[kind])},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles, maximum and mean."""
    points = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}
    found = np.percentile(values, list(points.values()), method="inverted_cdf")
    return {name: found[i].item() for i, name in enumerate(points)} | {"max": max(values), "mean": _mean(values)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def agreement_of(row: dict[str, Any]) -> float | None:
    """The share of raters (or a judge's probability) that stands behind the label: `agreement`, else from `votes`.

    `votes` is a list with a vote each (true, 1 or "chosen" for the label) or {"chosen": n, "rejected": m}.
    """
    share = number(row.get("agreement"))
    if share is None:
        share = _share_of_votes(row.get("votes"))
    return share if share is not None and 0 <= share <= 1 else None


def _share_of_votes(votes: Any) -> float | None:
    if isinstance(votes, dict):
        counts = [number(votes.get(name)) or 0.0 for name in ("chosen", "rejected")]
        return counts[0] / sum(counts) if sum(counts) > 0 else None
    if not isinstance(votes, list) or not votes:
        return None
    return sum(vote in (True, 1, "chosen") for vote in votes) / len(votes)


def scores_of(row: dict[str, Any]) -> tuple[float, float] | None:
    """The ratings of chosen and rejected, where the row has both."""
    for names in SCORES:
        found = [number(row.get(name)) for name in names]
        if None not in found:
            return found[0], found[1]  # type: ignore[return-value]
    return None


def number(value: Any) -> float | None:
    """`value` as a finite number, also where it is written as text; None where it is none."""
    try:
        found = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found is not None and math.isfinite(found) else None


def measure_agreement(rows: Rows) -> dict[str, Any] | None:
    """How sure the labels are; None where no row says it. `noise` is the mean share of votes against the label: about
    that share of single raters would have labelled otherwise, and no policy can be expected to agree with them.
    """
    shares = [share for row in rows if (share := agreement_of(row)) is not None]
    if not shares:
        return None
    tenths = Counter(min(9, math.floor(10 * share + 1e-9)) for share in shares)
    return {
        "rows": len(shares),
        "mean": _mean(shares),
        "noise": 1 - _mean(shares),
        "below_0.7": _mean([share < 0.7 for share in shares]),
        "below_half": _mean([share < 0.5 for share in shares]),
        "histogram": [[tenth / 10, tenths[tenth]] for tenth in range(10)],
    }


def measure_scores(rows: Rows) -> dict[str, Any] | None:
    """Chosen minus rejected rating; `ties` and `reversed` are shares. None where no row has ratings."""
    gaps = [found[0] - found[1] for row in rows if (found := scores_of(row)) is not None]
    if not gaps:
        return None
    return {
        "rows": len(gaps),
        "gap": spread(gaps),
        "ties": _mean([gap == 0 for gap in gaps]),
        "reversed": _mean([gap < 0 for gap in gaps]),
    }


def measure_balance(rows: Rows) -> dict[str, Any]:
    """For each column that names a source or a category: how many values it has, and the largest with their rows."""
    found = {}
    for column in SOURCES:
        counts = Counter(str(row[column]) for row in rows if row.get(column) is not None)
        if counts:
            found[column] = {"values": len(counts), "largest": dict(counts.most_common(10))}
    return found


def measure_classes(rows: Rows) -> dict[str, Any]:
    """Thumbs up and down, and weights with which n_up·w_up : n_down·w_down is within 1:1 and 4:3 (KTO,
    arXiv:2402.01306, section 4.2): the scarcer class is given more, the other stays at 1.
    """
    up = sum(row["label"] for row in rows)
    down = len(rows) - up
    weights = {"desirable_weight": [1.0, 1.0], "undesirable_weight": [1.0, 1.0]}
    if up and down and up < down:
        weights["desirable_weight"] = [down / up, 4 * down / (3 * up)]
    elif up and down and 3 * up > 4 * down:
        weights["undesirable_weight"] = [3 * up / (4 * down), up / down]
    return {"desirable": up, "undesirable": down, "weights": weights}


def measure_size(rows: int) -> dict[str, Any]:
    """The number of rows against what preference tuning usually takes."""
    verdict = "few" if rows < ENOUGH else "can do" if rows < USUAL[0] else "usual" if rows <= USUAL[1] else "many"
    return {"rows": rows, "usual": list(USUAL), "can_do": ENOUGH, "verdict": verdict}
