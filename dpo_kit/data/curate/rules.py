"""Which rows are worth training on: filters in a fixed order, every row that is left out kept with its reason.

The result depends on the rows, the options and the seed, never on the order of the rows: they are sorted by a hash of
their content first, and whatever is drawn is drawn by such a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_kit.data.curate.options import Curate
from dpo_kit.data.gather import Rows
from dpo_kit.data.report.duplicates import content_keys, find_copies, find_near, rank, sketch
from dpo_kit.data.report.figures import agreement_of, scores_of
from dpo_kit.data.report.leaks import find_leaks
from dpo_kit.data.rows import Kind
from dpo_kit.errors import ConfigError, DataError

LENGTH_BINS = 10
Reasons = dict[int, tuple[str, str]]  # {index of a row left out: (countable reason, what was found)}


@dataclass
class Curated:
    """The rows that stay and those that go, these with their reason and what was found; both sorted by content."""

    kept: Rows
    left_out: list[tuple[dict[str, Any], str, str]]


@dataclass
class Setting:
    """What the filters know beside the rows. `hardness` gives each pair's margin under the untrained reference."""

    kind: Kind
    options: Curate
    seed: int
    held: Sequence[str] = ()  # prompts of held-out rows and of a benchmark
    hardness: Callable[[Rows], Sequence[float]] | None = None


def curate(rows: Rows, setting: Setting) -> Curated:
    """Apply every filter that is on to `rows`, as `keep_signal` leaves them. Raises ConfigError, DataError."""
    _refuse_pairs_only(setting)
    kept = sorted(rows, key=lambda row: row_hash(row["_values"]))
    left_out = []
    for find in FILTERS:
        reasons = find(kept, setting)
        left_out += [(kept[index], *reasons[index]) for index in sorted(reasons)]
        kept = [row for index, row in enumerate(kept) if index not in reasons]
    if not kept:
        counted = ", ".join(f"{reason}: {n}" for reason, n in Counter(reason for _, reason, _ in left_out).items())
        raise DataError(f"no row is left ({counted}): loosen these filters")
    return Curated(kept, left_out)


def row_hash(values: dict[str, Any], seed: int | None = None) -> str:
    """A hash of a whole row; with a seed a number by which rows are drawn."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256((text if seed is None else f"{seed} {text}").encode()).hexdigest()


def _refuse_pairs_only(setting: Setting) -> None:
    options = setting.options
    asked = [name for name in ("balance_length", "hardest") if getattr(options, name)]
    if setting.kind == "unary" and asked:
        raise ConfigError(f"curate.{asked[0]} compares two answers, but these rows have one: leave it out")


# --- filters -----------------------------------------------------------------------------------------------------


def _leaks(rows: Rows, setting: Setting) -> Reasons:
    if not (setting.options.drop_leaks and setting.held):
        return {}
    leaks = find_leaks(rows, setting.held, sketch(rows, setting.kind).prompts)
    return {index: ("prompt is held out or in the benchmark", prompt[:80]) for index, prompt in leaks.items()}


def _contradictions(rows: Rows, setting: Setting) -> Reasons:
    """Rows whose two answers stand with the other label too: both sides, since nothing says which is right."""
    if not setting.options.drop_contradictions:
        return {}
    keys = content_keys(rows, setting.kind)
    order = rank(rows, keys)
    groups = find_copies(rows, setting.kind, keys, order).contradictions
    near = find_near(rows, setting.kind, sketch(rows, setting.kind).rows, order).contradictions
    found: Reasons = {}
    for group in (*groups, *(list(pair) for pair in near)):
        for index in group:
            other = next(other for other in group if other != index)
            found.setdefault(index, ("contradicts another row", rows[other]["_place"]))
    return found


def _disagreement(rows: Rows, setting: Setting) -> Reasons:
    least, found = setting.options.min_agreement, {}
    for index, row in enumerate(rows):
        share = agreement_of(row)
        if share == 0.5 and setting.options.drop_ties:
            found[index] = ("tie", "half of the votes")
        elif share is not None and least is not None and share < least:
            found[index] = ("raters disagree", f"agreement {share:.2f} below {least:g}")
    return found


def _ratings(rows: Rows, setting: Setting) -> Reasons:
    found = {}
    for index, row in enumerate(rows):
        scores = scores_of(row)
        reason = None if scores is None else _rating_reason(*scores, setting.options, row["_place"])
        if reason is not None and scores is not None:
            found[index] = (reason, f"{scores[0]:g} against {scores[1]:g}")
    return found


def _rating_reason(chosen: float, rejected: float, options: Curate, place: str) -> str | None:
    if chosen == rejected:
        return "tie" if options.drop_ties else None
    if options.min_gap is not None and chosen - rejected < options.min_gap:
        return "rated the other way round" if chosen < rejected else "ratings too close"
    if options.least_ratio is None:
        return None
    if chosen < 0 or rejected < 0:
        least = min(chosen, rejected)
        raise DataError(f"{place}: {least:g}, a rating below zero, is on no ratio scale: curate.scale=interval")
    return "ratio of ratings too small" if chosen < options.least_ratio * rejected else None


def _duplicates(rows: Rows, setting: Setting) -> Reasons:
    """Copies and near-duplicates of a row that stays: the one with the surest label, then by content."""
    if not setting.options.drop_duplicates:
        return {}
    keys = content_keys(rows, setting.kind)
    order = rank(rows, keys)
    copies = find_copies(rows, setting.kind, keys, order).first
    rest = [index for index in order if index not in copies]
    near = find_near(rows, setting.kind, sketch(rows, setting.kind).rows, rest).leader
    found = {index: ("copy of another row", rows[first]["_place"]) for index, first in copies.items()}
    return found | {index: ("near-duplicate of another row", rows[first]["_place"]) for index, first in near.items()}


def _sources(rows: Rows, setting: Setting) -> Reasons:
    cap, column = setting.options.per_source, setting.options.source
    if cap is None:
        return {}
    by_source: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if column not in row:
            raise ConfigError(f"curate.source={column}: {row['_place']} has no such column")
        by_source[str(row[column])].append(index)
    over = [(name, index) for name, each in by_source.items() for index in _drawn(rows, each, setting.seed)[cap:]]
    return {index: (f"more than curate.per_source={cap} rows of its source", name) for name, index in over}


def _drawn(rows: Rows, indices: Sequence[int], seed: int) -> list[int]:
    """`indices` in a seeded order that depends on the rows' content alone."""
    return sorted(indices, key=lambda index: row_hash(rows[index]["_values"], seed))


def _lengths(rows: Rows, setting: Setting) -> Reasons:
    """Where more pairs of some difference in length have the longer answer chosen than rejected, the surplus goes (and
    the other way round), so that length says nothing about the label.
    """
    if not setting.options.balance_length:
        return {}
    gaps = np.array([row["tokens"]["chosen"] - row["tokens"]["rejected"] for row in rows])
    unequal = np.flatnonzero(gaps)
    edges = np.quantile(np.abs(gaps[unequal]), np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]) if len(unequal) else []
    bins = np.searchsorted(edges, np.abs(gaps))
    found: Reasons = {}
    for number in range(LENGTH_BINS):
        sides = [[int(i) for i in unequal if bins[i] == number and (gaps[i] > 0) == longer] for longer in (True, False)]
        few = min(map(len, sides))
        for side in sides:
            surplus = _drawn(rows, side, setting.seed)[few:]
            found |= {i: ("surplus of its length", f"chosen {gaps[i]:+d} tokens") for i in surplus}
    return found


def _hardest(rows: Rows, setting: Setting) -> Reasons:
    count = setting.options.hardest
    if count is None or setting.hardness is None:
        return {}
    margins = setting.hardness(rows)
    easy = sorted(range(len(rows)), key=lambda index: (margins[index], index))[count:]
    return {index: ("not among the hardest", f"margin {margins[index]:.3f} nats a token") for index in easy}


FILTERS: tuple[Callable[[Rows, Setting], Reasons], ...] = (
    _leaks,
    _contradictions,
    _disagreement,
    _ratings,
    _duplicates,
    _sources,
    _lengths,
    _hardest,
)
