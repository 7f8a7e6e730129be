"""What a part of an evaluation is, and how its figures are put into words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_kit.evaluate.job import Job

Found = dict[str, Any]
Line = tuple[str, str, str]  # measure, value, 95 % interval


@dataclass(frozen=True)
class Part:
    """One part of an evaluation.

    measure: the findings, plain values, with `status` (done, partial, waiting, skipped with `reason`) among them.
    headline: the few of them that result.json has, under the same names everywhere.
    lines: rows of the table on the terminal. warnings: sentences that must stand above it. notes: those below.
    check: refuses what can be seen to be wrong before anything is measured.
    """

    measure: Callable[[Job], Found]
    headline: Callable[[Found], Found]
    lines: Callable[[Found], Iterator[Line]]
    warnings: Callable[[Found], Iterator[str]] = lambda found: iter(())
    notes: Callable[[Found], Iterator[str]] = lambda found: iter(())
    check: Callable[[Job], object] = lambda job: None


def interval_line(found: Mapping[str, Any], key: str, label: str, form: str = ".3f") -> Iterator[Line]:
    """The row of the table for `key` and its `_low` and `_high`; nothing where it was not measured."""
    value, low, high = (found.get(f"{key}{end}") for end in ("", "_low", "_high"))
    if value is not None:
        yield label, number_text(value, form), interval_text(low, high, form)


def interval_text(low: float | None, high: float | None, form: str) -> str:
    """[low, high], or nothing where one of them is not known."""
    if low is None or high is None:
        return ""
    return f"[{number_text(low, form)}, {number_text(high, form)}]"


def number_text(value: Any, form: str) -> str:
    """A number for the reader: a real minus, and none before 0."""
    text = f"{value:{form}}"
    return f"{0:{form}}" if float(text) == 0 else text.replace("-", "−")
