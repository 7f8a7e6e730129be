"""Warnings: what was found, why it matters, what to do (advice.yaml). Thresholds stand beside their reason."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.data.report.figures import ENOUGH
from dpo_kit.data.rows import Kind

SHORTCUT = 0.6  # accuracy of a rule from which on it may be what is learned; below 1 - SHORTCUT likewise
NOISE = 0.25  # share of votes against the labels
CUT = 0.05  # share of rows that lose the end of an answer
ONE_SOURCE = 0.8
ONE_CLUSTER = 0.2


@cache
def _texts() -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def warn(warning: str, /, **values: Any) -> dict[str, str]:
    """The words of `warning`: {about: the report's key, what, why, do}."""
    return {part: text.format(**values) for part, text in _texts()[warning].items()}


def advise(report: dict[str, Any], wanted: Kind | None) -> list[dict[str, str]]:
    """All warnings on `report`, the most costly first. `wanted` is the kind of rows that the method trains on."""
    return list(_warnings(report, wanted))


def _warnings(report: dict[str, Any], wanted: Kind | None) -> Iterator[dict[str, str]]:
    if report["kind"] == "unary" and wanted == "pairs":
        yield warn("unary")
    if parts := report["unused_parts_of_prompts"]:
        yield warn("unused parts", columns=", ".join(parts))
    if report.get("answers_end_in", "") is None:
        yield warn("no end")
    if dropped := sum(n for name, n in report["dropped_by_reason"].items() if name != "prompt is held out"):
        yield warn("dropped", count=dropped, read=report["rows_read"])
    near = report.get("near_contradictions", {}).get("rows", 0)
    if count := report["contradictions"]["rows"] + near:
        yield warn("contradictions", count=count, near=near)
    for name in ("leaks", "benchmark"):
        if count := report[name]["rows"]:
            yield warn(name, count=count)
    for name, rule in report.get("shortcuts", {}).items():
        worse = rule["high"] < 1 - SHORTCUT
        if name != "longer (characters)" and (rule["low"] > SHORTCUT or worse):  # length is told by the tokens
            right = 1 - rule["accuracy"] if worse else rule["accuracy"]
            told = "longer shortcut" if "longer" in name else "shortcut"
            yield warn(told, rule=f"{'not ' if worse else ''}{name}", right=right)
    raters = report["agreement"]
    if raters and raters["noise"] > NOISE:
        yield warn("noise", **raters, smoothing=min(raters["noise"], 0.45))
    scores = report["scores"]
    if scores and scores["ties"] + scores["reversed"] > 0.02:
        yield warn("ratings", **scores)
    rows = report["rows_read"] - report["rows"]["dropped"]
    copies = report["copies"]["rows"] + report.get("near_duplicates", {}).get("rows", 0)
    if copies > 0.01 * report["rows_read"]:
        yield warn("copies", count=copies)
    diversity = report.get("diversity")
    if diversity and diversity["largest"] and diversity["largest_cluster"] > ONE_CLUSTER:
        yield warn("one pattern", share=diversity["largest_cluster"], pattern=diversity["largest"][0][0])
    if report["cut_at_max_length"] > CUT * rows:
        yield warn("cut", limit=report["max_length"], count=report["cut_at_max_length"])
    for name, (low, high) in report.get("classes", {}).get("weights", {}).items():
        if low > 1:
            other = {"desirable_weight": "undesirable_weight"}.get(name, "desirable_weight")
            yield warn("classes", **report["classes"], name=name, other=other, low=low, high=high)
    for column, values in report["balance"].items():
        name, count = next(iter(values["largest"].items()))
        if values["values"] > 1 and count / rows > ONE_SOURCE:
            yield warn("one source", share=count / rows, column=column, name=name, most=max(1, count // 2))
    if report["rows"]["train"] < ENOUGH:
        yield warn("few rows", rows=report["rows"]["train"])
