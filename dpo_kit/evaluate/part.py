"""What a part of an evaluation is, and how its figures are put into words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_kit.evaluate.job import Job
from dpo_kit.run.report.numbers import number_text, range_text

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
    ends = None if low is None or high is None else (low, high)
    return label, number_text(value, form), range_text(ends, form)
