"""What a part of an evaluation is, and how its figures are put into words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dpo_kit.evaluate.job import Job

Found = dict[str, Any]
Line = tuple[str, str, str]  # measure, value, 95 % interval


class Part:
    """One part of an evaluation: what it measures, and what of its findings (`found`, plain values) is shown."""

    def check(self, job: Job) -> None:
        """Refuse what can be seen to be wrong before anything is measured. ConfigError, DataError."""

    def measure(self, job: Job) -> Found:
        """The findings, with `status` (done, partial, waiting, skipped with `reason`) among them."""
        raise NotImplementedError

    def headline(self, found: Found) -> Found:
        """The few findings that result.json has, under the same names everywhere."""
        raise NotImplementedError

    def lines(self, found: Found) -> Iterable[Line]:
        """Rows of the table on the terminal."""
        raise NotImplementedError

    def warnings(self, found: Found) -> Iterable[str]:
        """Sentences that must stand above the table."""
        return ()

    def notes(self, found: Found) -> Iterable[str]:
        """Sentences below the table."""
        return ()


def line(label: str, value: float, low: float | None, high: float | None, form: str = ".3f") -> Line:
    """A row of the table; without an interval where one of its ends is not known."""
    known = low is not None and high is not None
    return label, number_text(value, form), f"[{number_text(low, form)}, {number_text(high, form)}]" if known else ""


def interval_lines(found: Mapping[str, Any], labels: Mapping[str, str], form: str = ".3f") -> Iterator[Line]:
    """The row of each key of `labels` with its `_low` and `_high`; none for what was not measured."""
    for key, label in labels.items():
        if found.get(key) is not None:
            yield line(label, found[key], found.get(f"{key}_low"), found.get(f"{key}_high"), form)


def number_text(value: Any, form: str) -> str:
    """A number for the reader: a real minus, and none before 0."""
    text = f"{value:{form}}"
    return f"{0:{form}}" if float(text) == 0 else text.replace("-", "−")
