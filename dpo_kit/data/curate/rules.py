"""Which rows are worth training on: filters in a fixed order, every row that is left out kept with its reason.

The result depends on the rows, the options and the seed, never on the order of the rows: they are sorted by a hash of
their content first, and whatever is drawn is drawn by such a hash.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_kit.data.options import Curate
from dpo_kit.data.read import Fault
from dpo_kit.data.report.duplicates import find_copies, find_leaks
from dpo_kit.data.report.figures import agreement_of, scores_of
from dpo_kit.data.report.near import find_near, near_leaks, sketch
from dpo_kit.data.rows import Kind, Rows
from dpo_kit.errors import ConfigError, DataError

LENGTH_BINS = 10
LeftOut = Iterator[tuple[int, str, str]]  # index of a row, countable reason, what was found; the first reason counts


@dataclass
class Setting:
    """What the filters know beside the rows. `hardness` gives each pair's margin under the untrained reference."""

    kind: Kind
    options: Curate
    seed: int
    held: Sequence[str] = ()  # prompts of held-out rows and of a benchmark
    hardness: Callable[[Rows], Sequence[float]] | None = None


def curate(rows: Rows, setting: Setting) -> tuple[Rows, list[tuple[dict[str, Any], Fault]]]:
    """The rows that every filter that is on leaves of `rows` (which `keep_signal` has left), and those that go with
    their fault; both sorted by content. Raises ConfigError, DataError.
    """
    options = setting.options
    for name in ("balance_length", "hardest"):
        if setting.kind == "unary" and getattr(options, name):
            raise ConfigError(f"curate.{name} compares two answers, but these rows have one: leave it out")
    filters: dict[Callable[[Rows, Setting], LeftOut], Any] = {
        _leaks: options.drop_leaks and setting.held,
        _contradictions: options.drop_contradictions,
        _disagreement: True,
        _ratings: True,
        _duplicates: options.drop_duplicates,
        _sources: options.per_source,
        _lengths: options.balance_length,
        _hardest: options.hardest,
    }
    kept = sorted(rows, key=lambda row: row_hash(row["_values"]))
    left_out: list[tuple[dict[str, Any], Fault]] = []
    for find in (find for find, is_on in filters.items() if is_on):
        reasons: dict[int, tuple[str, str]] = {}
        for index, reason, found in find(kept, setting):
            reasons.setdefault(index, (reason, found))
        left_out += [(kept[index], Fault(kept[index]["_place"], *reasons[index])) for index in sorted(reasons)]
        kept = [row for index, row in enumerate(kept) if index not in reasons]
    if not kept:
        counts = Counter(fault.reason for _, fault in left_out)
        counted = ", ".join(f"{reason}: {n}" for reason, n in counts.items())
        raise DataError(f"no row is left ({counted}): loosen these filters")
    return kept, left_out


def row_hash(values: dict[str, Any], seed: int | None = None) -> str:
    """A hash of a whole row; with a seed a number by which rows are drawn."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256((text if seed is None else f"{seed} {text}").encode()).hexdigest()


def _drawn(rows: Rows, indices: Sequence[int], seed: int) -> list[int]:
    """`indices` in a seeded order that depends on the rows' content alone."""
    return sorted(indices, key=lambda index: row_hash(rows[index]["_values"], seed))


# --- filters -----------------------------------------------------------------------------------------------------


def _leaks(rows: Rows, setting: Setting) -> LeftOut:
    leaks = near_leaks(rows, setting.held, sketch(rows, setting.kind)[1]) | find_leaks(rows, setting.held)
    yield from ((index, "prompt is held out or in the benchmark", prompt[:80]) for index, prompt in leaks.items())


def _contradictions(rows: Rows, setting: Setting) -> LeftOut:
    """Rows whose two answers stand with the other label too: both sides, since nothing says which is right."""
    order, _, groups = find_copies(rows, setting.kind)
    _, near, _ = find_near(rows, setting.kind, sketch(rows, setting.kind)[0], order)
    for group in (*groups, *near):
        for index in group:
            other = next(other for other in group if other != index)
            yield index, "contradicts another row", rows[other]["_place"]


def _disagreement(rows: Rows, setting: Setting) -> LeftOut:
    least = setting.options.min_agreement
    for index, share in enumerate(map(agreement_of, rows)):
        if share == 0.5 and setting.options.drop_ties:
            yield index, "tie", "half of the votes"
        elif share is not None and least is not None and share < least:
            yield index, "raters disagree", f"agreement {share:.2f} below {least:g}"


def _ratings(rows: Rows, setting: Setting) -> LeftOut:
    options = setting.options
    rated = ((index, *scores) for index, row in enumerate(rows) if (scores := scores_of(row)) is not None)
    for index, chosen, rejected in rated:
        reason = None
        if chosen == rejected:
            reason = "tie" if options.drop_ties else None
        elif options.min_gap is not None and chosen - rejected < options.min_gap:
            reason = "rated the other way round" if chosen < rejected else "ratings too close"
        elif options.min_ratio is not None:
            if (least := min(chosen, rejected)) < 0:
                amiss = f"{least:g}, a rating below zero, has no ratio to another: leave out curate.min_ratio"
                raise DataError(f"{rows[index]['_place']}: {amiss}")
            reason = "ratio of ratings too small" if chosen < options.min_ratio * rejected else None
        if reason:
            yield index, reason, f"{chosen:g} against {rejected:g}"


def _duplicates(rows: Rows, setting: Setting) -> LeftOut:
    """Copies and near-duplicates of a row that stays: the one with the surest label, then by content."""
    order, copies, _ = find_copies(rows, setting.kind)
    rest = [index for index in order if index not in copies]
    near, _, _ = find_near(rows, setting.kind, sketch(rows, setting.kind)[0], rest)
    for reason, repeated in (("copy of another row", copies), ("near-duplicate of another row", near)):
        yield from ((index, reason, rows[first]["_place"]) for index, first in repeated.items())


def _sources(rows: Rows, setting: Setting) -> LeftOut:
    cap, column = setting.options.per_source, setting.options.source
    by_source: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if column not in row:
            raise ConfigError(f"curate.source={column}: {row['_place']} has no such column")
        by_source[str(row[column])].append(index)
    reason = f"more than curate.per_source={cap} rows of its source"
    for name, indices in by_source.items():
        yield from ((index, reason, name) for index in _drawn(rows, indices, setting.seed)[cap:])


def _lengths(rows: Rows, setting: Setting) -> LeftOut:
    """The surplus of pairs whose longer (or shorter) answer is chosen, at each difference in length."""
    gaps = np.array([row["tokens"]["chosen"] - row["tokens"]["rejected"] for row in rows])
    unequal = np.flatnonzero(gaps)
    edges = np.quantile(np.abs(gaps[unequal]), np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]) if len(unequal) else []
    bins = np.searchsorted(edges, np.abs(gaps))
    for number in range(LENGTH_BINS):
        sides = [[int(i) for i in unequal if bins[i] == number and (gaps[i] > 0) == longer] for longer in (True, False)]
        for surplus in (_drawn(rows, side, setting.seed)[min(map(len, sides)) :] for side in sides):
            yield from ((i, "surplus of its length", f"chosen {gaps[i]:+d} tokens") for i in surplus)


def _hardest(rows: Rows, setting: Setting) -> LeftOut:
    margins = setting.hardness(rows) if setting.hardness else []
    easy = sorted(range(len(margins)), key=lambda index: (margins[index], index))[setting.options.hardest :]
    yield from ((index, "not among the hardest", f"margin {margins[index]:.3f} nats a token") for index in easy)
