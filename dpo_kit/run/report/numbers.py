"""Numbers and intervals as texts, and the short table at the end of a run. Standard library and rich only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from dpo_kit.run.intervals import Z95
from dpo_kit.run.measures import KLS, MEASURES, in_rounding, kl_key

if TYPE_CHECKING:
    from rich.table import Table


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def number_text(value: Any, form: str) -> str:
    """A number for the reader: a real minus, none before 0; a dash for what is no number."""
    if not is_number(value):
        return "–"
    text = f"{value:{form}}"
    return f"{0:{form}}" if float(text) == 0 else text.replace("-", "−")


def bounds(values: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The ends of the 95 % interval of a measured key: its `_low` and `_high`, or 1.96 of its `_se`; None without."""
    low, high, error = (values.get(f"{key}_{end}") for end in ("low", "high", "se"))
    if is_number(low) and is_number(high):
        return low, high
    return (values[key] - Z95 * error, values[key] + Z95 * error) if is_number(error) else None


def range_text(ends: tuple[float, float] | None, form: str) -> str:
    """`[low, high]`, or an empty text where they are not known."""
    return f"[{number_text(ends[0], form)}, {number_text(ends[1], form)}]" if ends else ""


def cells(values: Mapping[str, Any], key: str, form: str = ".3f") -> tuple[str, str]:
    """A measured key, with "(rounding)" where it is no more, and its 95 % interval; empty where it has none."""
    rounding = " (rounding)" if in_rounding(key, values) else ""
    return number_text(values[key], form) + rounding, range_text(bounds(values, key), form)


def value_text(values: Mapping[str, Any], key: str, form: str = ".3f") -> str:
    """`cells` in one text."""
    return " ".join(cells(values, key, form)).rstrip()


def labelled_rows(
    values: Mapping[str, Any], labels: Mapping[str, str], form: str = ".3f"
) -> list[tuple[str, str, str]]:
    """(label, value, 95 % interval) as texts for each key of `labels` that was measured."""
    return [(label, *cells(values, key, form)) for key, label in labels.items() if values.get(key) is not None]


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
