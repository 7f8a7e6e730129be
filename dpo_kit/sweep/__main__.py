"""`python -m dpo_kit sweep sweep=DIR`: the table, pictures and choice of runs that are there already."""

import sys
from collections.abc import Sequence

from pydantic import ValidationError

from dpo_kit.config.places import file_faults, refuse_unwritable
from dpo_kit.config.settings import Choose
from dpo_kit.config.tools import parse, run_tool, usage
from dpo_kit.errors import ConfigError
from dpo_kit.sweep.summary import measure_recommended, sample_reference, show_summary

KEYS = ("sweep", "test", "ideal", *(f"choose.{name}" for name in Choose.model_fields))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the arguments or the folder are refused."""
    return run_tool("sweep", usage(__file__), arguments, summarise)


def summarise(arguments: Sequence[str]) -> None:
    """Write and show the summary that `arguments` ask for. ConfigError."""
    values = parse(arguments, KEYS, needed="sweep", meaning="DIR, a folder whose subfolders are runs")
    if values.get("test", "false") not in ("true", "false"):
        raise ConfigError(f"test must be true or false, got {values['test']}")
    given = {key.removeprefix("choose."): value for key, value in values.items() if key.startswith("choose.")}
    try:
        limits = Choose.model_validate(given).model_dump(include={*given})
    except ValidationError as error:
        message, (name, *_) = error.errors()[0]["msg"], error.errors()[0]["loc"]
        raise ConfigError(f"choose.{name}: {message[0].lower()}{message[1:]}, got {given[str(name)]}") from error
    refuse_unwritable("sweep", values["sweep"])
    if faults := [*file_faults("ideal", values["ideal"])] if "ideal" in values else []:
        raise ConfigError(faults[0])
    if values.get("test") == "true":
        measure_recommended(values["sweep"], **limits)
        sample_reference(values["sweep"])
    show_summary(values["sweep"], ideal=values.get("ideal"), **limits)


if __name__ == "__main__":
    sys.exit(main())
