"""Numbers and intervals as texts. Standard library only."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from dpo_kit.run.intervals import Z95
from dpo_kit.run.rounding import in_rounding


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
