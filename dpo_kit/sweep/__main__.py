"""`python -m dpo_kit.sweep sweep=DIR`: the table, pictures and choice of runs that are there already."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from dpo_kit.errors import ConfigError, DpoKitError
from dpo_kit.settings import Choose
from dpo_kit.sweep.conclude import measure_recommended
from dpo_kit.sweep.summary import show_summary

DONE, REFUSED = 0, 2
USAGE = """\
usage: python -m dpo_kit.sweep sweep=DIR [key=value] …

  sweep=DIR                    a folder whose subfolders are runs
  test=true                    measure the recommended run on the test split first (it loads the model)
  choose.kl_budget_nats=10     reverse KL at most, nats per answer (default: as the runs were started)
  choose.max_regression=0.03   capability that may be lost, a share (default: as the runs were started)
  ideal=FILE                   the best possible frontier to draw: {"ideal": [[kl, gold], …], "best_of_n": [[n, kl, gold], …]}

Writes summary.csv, summary.md, best.json, frontier.png and curves.png into DIR.
"""  # noqa: E501
KEYS = ("sweep", "test", "ideal", *(f"choose.{name}" for name in Choose.model_fields))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the arguments or the folder are refused."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-h"} & set(given):
        sys.stdout.write(USAGE)
        return DONE
    try:
        values = parse(given)
        budget, regression = (_number(values.get(f"choose.{name}")) for name in ("kl_budget_nats", "max_regression"))
        if values.get("test") == "true":
            measure_recommended(values["sweep"])
        show_summary(values["sweep"], ideal=values.get("ideal"), kl_budget_nats=budget, max_regression=regression)
    except DpoKitError as error:
        sys.stderr.write(f"dpo_kit.sweep: refused: {error}\n")
        return REFUSED
    return DONE


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """{key: value} of `key=value` arguments. ConfigError names what is wrong and what was probably meant."""
    values: dict[str, str] = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"arguments are key=value, got {word}; did you mean sweep={word}?")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
            raise ConfigError(f"unknown key {key}; {hint}")
        values[key] = value
    if not values.get("sweep"):
        raise ConfigError("sweep is missing: add sweep=DIR, a folder whose subfolders are runs")
    if values.get("test", "false") not in ("true", "false"):
        raise ConfigError(f"test must be true or false, got {values['test']}")
    _check_limits({key: value for key, value in values.items() if key.startswith("choose.")})
    return values


def _check_limits(limits: dict[str, str]) -> None:
    for key, value in limits.items():
        try:
            Choose.model_validate({key.removeprefix("choose."): value})
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ConfigError(f"{key}: {message[0].lower()}{message[1:]}, got {value}") from error


if __name__ == "__main__":
    sys.exit(main())
