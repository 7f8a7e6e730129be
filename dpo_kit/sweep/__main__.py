"""`python -m dpo_kit sweep sweep=DIR`: the table, pictures and choice of runs that are there already."""

import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from dpo_kit.config.places import file_faults, refuse_unwritable
from dpo_kit.config.settings import Choose
from dpo_kit.config.tools import parse, run_tool, usage
from dpo_kit.errors import ConfigError
from dpo_kit.sweep.summary import measure_recommended, show_summary

KEYS = ("sweep", "test", "ideal", *(f"choose.{name}" for name in Choose.model_fields))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the arguments or the folder are refused."""
    return run_tool("sweep", usage(__file__), arguments, summarise)


def summarise(arguments: Sequence[str]) -> None:
    """Write and show the summary that `arguments` ask for. ConfigError."""
    values = parse(arguments, KEYS, needed="sweep", meaning="DIR, a folder whose subfolders are runs")
    if values.get("test", "false") not in ("true", "false"):
        raise ConfigError(f"test must be true or false, got {values['test']}")
    limits: dict[str, Any] = {}
    for key, value in ((key, value) for key, value in values.items() if key.startswith("choose.")):
        name = key.removeprefix("choose.")
        try:
            limits[name] = getattr(Choose.model_validate({name: value}), name)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ConfigError(f"{key}: {message[0].lower()}{message[1:]}, got {value}") from error
    refuse_unwritable("sweep", values["sweep"])
    if faults := [*file_faults("ideal", values["ideal"])] if "ideal" in values else []:
        raise ConfigError(faults[0])
    if values.get("test") == "true":
        measure_recommended(values["sweep"])
    show_summary(values["sweep"], ideal=values.get("ideal"), **limits)


if __name__ == "__main__":
    sys.exit(main())
