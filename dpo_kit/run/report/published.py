"""A run beside the published one that it repeats, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_kit.run.report.numbers import number_text, range_text

SHOWN = 5  # differences in a sentence


def sentences(published: Mapping[str, Any]) -> Iterator[str]:
    """The comparison in words; a verdict only where the run is the published one as far as can be seen."""
    differs = published["differs"]
    for figure in published["figures"]:
        expected, value = figure["expected"], figure["measured"]
        low, high = min(expected), max(expected)
        known = number_text(low, ".3f") + (f" to {number_text(high, '.3f')}" if high > low else "")
        reports = f"{len(expected)} reports" if len(expected) > 1 else "one report"
        here = "not measured here"
        if value is not None:
            ends = (figure["low"], figure["high"]) if "low" in figure else None
            here = f"{number_text(value, '.3f')} {range_text(ends, '.3f')}".rstrip() + " here"
            bottom, top = ends or (value, value)
            if not differs:
                here += ": above" if bottom > high else ": below" if top < low else ": in agreement"
        yield f"{figure['key']}: {known} published ({reports}), {here}."
    if not published["figures"]:
        yield f"{published['name']}: {published['expected_from']}."
    if differs:
        more = f" and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
        yield f"Not the published run, so no verdict: {', '.join(differs[:SHOWN])}{more}."
