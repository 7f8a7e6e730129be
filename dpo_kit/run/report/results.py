"""What a run measured, as terminal, page and card show it; for the page also what an evaluation found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpo_kit.run.measures import KLS, MEASURE, MEASURES, WIN_RATES, as_measured, kl_key
from dpo_kit.run.report.markdown import inline, table
from dpo_kit.run.report.numbers import cells, is_number, labelled_rows, number_text, range_text
from dpo_kit.run.rounding import in_rounding

if TYPE_CHECKING:
    from rich.table import Table

    from dpo_kit.run.report.page import Facts

SHOWN = 5  # differences from a published run in a sentence
JUDGED = {key: MEASURE[key].row for key in ("probe/accuracy", "probe/auc", "probe/margin_nats", *WIN_RATES)}


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(measure, start, end, 95 % interval) as texts, for each measured quantity of `result` (as result.json holds it),
    the user's own last. Of the two estimators of a KL the one that is read; "(rounding)" stands behind what is no more.
    """
    start, final = result.get("start") or {}, result.get("final") or {}
    unread = {key for way, keys in KLS.items() for key in keys if key != kl_key(way, final)}
    shown = [(m.key, m.row, m.form) for m in MEASURES if m.label and m.key not in unread]
    shown += [(key, key.removeprefix("custom/"), ".3f") for key in final if key.startswith("custom/")]
    return [
        (row, number_text(start.get(key), form), *cells(final, key, form))
        for key, row, form in shown
        if is_number(final.get(key))
    ]


def result_table(result: Mapping[str, Any]) -> Table:
    """The rows of `result_rows` for the terminal."""
    from rich.table import Table

    title = f"{result['method']} · beta {result['beta']:g} · {result['steps']} steps"
    caption = ceiling_line(result.get("final") or {}, result.get("ceiling"))
    table = Table("held-out measure", title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in ("start", "end", "95 % interval"):
        table.add_column(name, justify="right")
    for row in result_rows(result):
        table.add_row(*row)
    return table


def ceiling_line(final: Mapping[str, Any], ceiling: float | None) -> str | None:
    """How much of the accuracy that label noise leaves was reached; None where that is not known, or rounding."""
    accuracy = final.get("probe/accuracy")
    if not is_number(accuracy) or ceiling is None or ceiling <= 0.5 or in_rounding("probe/accuracy", final):
        return None
    share = (accuracy - 0.5) / (ceiling - 0.5)
    return f"accuracy went {share:.0%} of the way from .5 to {ceiling:.3f}, the most that noise in the labels leaves"


def measured(result: Mapping[str, Any]) -> Iterator[str]:
    """What a run measured, as result.json holds it, with intervals, for a page or a card."""
    yield "## Measured\n\nOn held-out prompts, against the model that training started from."
    yield table(("measure", "start", "end", "95 % interval"), result_rows(result))
    if note := ceiling_line(result.get("final") or {}, result.get("ceiling")):
        yield f"{note[0].upper()}{note[1:]}."


def sentences(published: Mapping[str, Any]) -> Iterator[str]:
    """A run beside the published one that it repeats; a verdict only where it is that one as far as can be seen."""
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


def results(facts: Facts) -> Iterator[str]:
    """For the page: what was measured, here and beside a published run, and what an evaluation found."""
    if result_rows(facts.result):
        yield from measured(facts.result)
        if facts.test:
            rows = result_rows({"final": facts.test})
            values = "; ".join(f"{label} {value} {interval}".rstrip() for label, _, value, interval in rows)
            yield f"On the test split, which played no part in any choice: {values}."
        if facts.run.picture.exists():
            yield "![the measures over steps](report.png)"
    if published := facts.result.get("published"):
        yield "## Beside the published run"
        yield "\n".join(f"- {inline(line)}" for line in sentences(published))
        yield f"Source: {inline(published['source'])}. Values: {inline(published['expected_from'])}."
    if judged := facts.judged:
        folder = facts.run.evaluation
        yield f"## Evaluated against {inline(str(judged['opponent']))}, {judged['split']} split"
        yield table(("measure", "value", "95 % interval"), labelled_rows(judged | as_measured(judged), JUDGED))
        if failed := (judged.get("judge") or {}).get("controls_failed"):
            yield f"**The judge failed these controls: {inline(', '.join(map(str, failed)))}.**"
        parts = [f"{inline(name)} {inline(str(state))}" for name, state in judged["parts"].items()]
        links = [f"[{name}](evaluation/{name})" for name in ("result.json", "samples.md") if (folder / name).exists()]
        yield f"Parts: {', '.join(parts)}. All of it: {', '.join(links)}."
        if (folder / "evaluation.png").exists():
            yield "![the evaluation](evaluation/evaluation.png)"
