"""Votes of several raters on the same things: majorities, and how far the raters agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Vote = Literal["a", "b", "tie"]
CODES: dict[Vote, int] = {"a": 0, "b": 1, "tie": 2}


def majority(votes: Sequence[Vote]) -> tuple[Vote, float]:
    """What most raters say, and the share of the most frequent vote; "tie" where neither a nor b has most votes.

    ValueError where nobody voted.
    """
    if not votes:
        raise ValueError("a majority needs at least one vote")
    (first, most), *others = Counter(votes).most_common()
    shared = bool(others) and others[0][1] == most
    return "tie" if shared else first, most / len(votes)


def rater_agreement(items: Sequence[Mapping[str, Vote]]) -> dict[str, Any]:
    """How far the raters of `items` ({rater: vote} each; raters may be missing) agree.

    `krippendorff_alpha` (nominal): 1 full agreement, 0 what chance would give; None where fewer than two votes can be
    compared or all votes are the same, so that chance explains everything. Which answer is a must not depend on who
    wins. `majority_share`: the mean share of votes for what most say; `unanimous`: share of items with one voice.
    """
    voted = [votes for votes in items if votes]
    raters = sorted({rater for votes in voted for rater in votes})
    shares = [majority(list(votes.values()))[1] for votes in voted if len(votes) > 1]
    same = [len(set(votes.values())) == 1 for votes in voted if len(votes) > 1]
    return {
        "items": len(voted),
        "raters": len(raters),
        "votes": sum(map(len, voted)),
        "krippendorff_alpha": _alpha(voted, raters),
        "majority_share": sum(shares) / len(shares) if shares else None,
        "unanimous": sum(same) / len(same) if same else None,
    }


def _alpha(items: Sequence[Mapping[str, Vote]], raters: Sequence[str]) -> float | None:
    import krippendorff
    import numpy

    comparable = [votes for votes in items if len(votes) > 1]
    if len({vote for votes in comparable for vote in votes.values()}) < 2:
        return None
    table = [[CODES[votes[r]] if r in votes else numpy.nan for votes in comparable] for r in raters]
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))
