"""A run beside the published one that it repeats: what was reached there, what here, and in what the two differ."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_kit.report import bounds, number_text
from dpo_kit.settings import Experiment

SAME = ("experiment=", "seed=", "tracking", "resume=", "hydra", "callbacks", "speed.", "choose.", "dry_run=")


def batch_fault(experiment: Experiment | None, trl: Mapping[str, Any], batch: int) -> str | None:
    """What to set where this run's `batch` (rows per optimizer step) is not that of the published one; else None."""
    if experiment is None or batch == experiment.batch:
        return None
    at_a_time = batch // trl["gradient_accumulation_steps"]
    steps, rest = divmod(experiment.batch, at_a_time)
    remedy = f"trl.gradient_accumulation_steps={steps}" if steps and not rest else "trl.per_device_train_batch_size"
    return f"{batch} rows per optimizer step, not {experiment.batch} ({remedy} makes it so)"


def compare(manifest: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The published values of each measured key beside this run's last one (of the rows of metrics.jsonl, `history`);
    None where no published run is repeated.

    `differs` says what was typed beyond the recipe, and another batch.
    """
    if not (given := manifest["config"].get("experiment")):
        return None
    experiment = Experiment(**given)
    final = {key: value for row in history for key, value in row.items() if value is not None}
    typed = shlex.split(manifest.get("command") or "")[3:]
    batch = batch_fault(experiment, manifest["config"]["trl"], manifest["effective_batch"])
    return {
        "name": experiment.name,
        "source": experiment.source,
        "expected_from": experiment.expected_from,
        "differs": [*(word for word in typed if not word.startswith(SAME)), *([batch] if batch else [])],
        "figures": [_figure(key, values, final) for key, values in experiment.expected.items()],
    }


def _figure(key: str, expected: Sequence[float], final: Mapping[str, Any]) -> dict[str, Any]:
    ends = bounds(final, key) if key in final else None
    interval = dict(zip(("low", "high"), ends, strict=True)) if ends else {}
    return {"key": key, "expected": list(expected), "measured": final.get(key), **interval}


def sentences(published: Mapping[str, Any]) -> Iterator[str]:
    """The comparison in words; a verdict only where the run is the published one as far as can be seen."""
    same = not published["differs"]
    for figure in published["figures"]:
        low, high = min(figure["expected"]), max(figure["expected"])
        there = number_text(low, ".3f") + (f" to {number_text(high, '.3f')}" if high > low else "")
        reports = f"{len(figure['expected'])} reports" if high > low else "one report"
        verdict = _verdict(figure, low, high) if same else ""
        yield f"{figure['key']}: {there} published ({reports}), {_here(figure)}{verdict}."
    if not published["figures"]:
        yield f"{published['name']}: {published['expected_from']}."
    if not same:
        yield f"Not the published run, so no verdict: {', '.join(published['differs'])}."


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
