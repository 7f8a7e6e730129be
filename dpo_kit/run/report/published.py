"""A run beside the published one that it repeats, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_kit.run.report.picture import number_text

SHOWN = 5  # differences in a sentence


def sentences(published: Mapping[str, Any]) -> Iterator[str]:
    """The comparison in words; a verdict only where the run is the published one as far as can be seen."""
    differs = published["differs"]
    same = not differs
    for figure in published["figures"]:
        low, high = min(figure["expected"]), max(figure["expected"])
        there = number_text(low, ".3f") + (f" to {number_text(high, '.3f')}" if high > low else "")
        reports = f"{len(figure['expected'])} reports" if len(figure["expected"]) > 1 else "one report"
        verdict = _verdict(figure, low, high) if same else ""
        yield f"{figure['key']}: {there} published ({reports}), {_here(figure)}{verdict}."
    if not published["figures"]:
        yield f"{published['name']}: {published['expected_from']}."
    if not same:
        more = f" and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
        yield f"Not the published run, so no verdict: {', '.join(differs[:SHOWN])}{more}."


def _here(figure: Mapping[str, Any]) -> str:
    if figure["measured"] is None:
        return "not measured here"
    interval = (
        f" [{number_text(figure['low'], '.3f')}, {number_text(figure['high'], '.3f')}]" if "low" in figure else ""
    )
    return f"{number_text(figure['measured'], '.3f')}{interval} here"


def _verdict(figure: Mapping[str, Any], low: float, high: float) -> str:
    """Whether this run's interval (the value itself where it has none) meets the published range."""
    value = figure["measured"]
    if value is None:
        return ""
    bottom, top = figure.get("low", value), figure.get("high", value)
    return ": above" if bottom > high else ": below" if top < low else ": in agreement"
