"""What the tools beside training share: `key=value` arguments, `--help`, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dpo_kit.errors import ConfigError, DataError, DpoKitError, ModelError, did_you_mean
from dpo_kit.run.redact import redact_text, refuse_secrets
from dpo_kit.run.words import with_home

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
Values = dict[str, str]


def run_tool(name: str, usage: str, arguments: Sequence[str] | None, work: Callable[[Sequence[str]], None]) -> int:
    """Exit code of `work`, called with `arguments` (None: those of the command line), as `guard` gives it.

    `--help` prints `usage` instead.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-h"} & set(given):
        sys.stdout.write(usage)
        return DONE
    return guard(f"dpo_kit {name}", given, lambda: work(given))


def guard(name: str, words: Sequence[str], work: Callable[[], None]) -> int:
    """Exit code of `work`: 0 done, 1 failed, 2 refused, 130 Ctrl-C; a secret among `words` is refused before it.

    What is wrong is said in one line on the error output, after `name`.
    """
    try:
        refuse_secrets({}, words)
        work()
    except (ConfigError, DataError, ModelError) as error:
        sys.stderr.write(f"{name}: refused: {redact_text(str(error))}\n")
        return REFUSED
    except DpoKitError as error:
        sys.stderr.write(f"{name}: failed: {redact_text(str(error))}\n")
        return FAILED
    except KeyboardInterrupt:
        exec("")  # clears CPython's mark of an interrupt inside an exec (many an import), with which it dies of SIGINT
        sys.stderr.write(f"{name}: interrupted\n")
        return INTERRUPTED
    return DONE


def parse(arguments: Sequence[str], keys: Sequence[str], *, needed: str | None = None, meaning: str = "") -> Values:
    """{key: value} of `key=value` arguments. ConfigError names what is wrong and what was probably meant.

    `needed` is the key that must be there, `meaning` what its value is.
    """
    values: Values = {}
    for word in arguments:
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-"):
            raise ConfigError(f"arguments are key=value without dashes: {key}={value or '…'}")
        if not equals:
            raise ConfigError(f"arguments are key=value, got {word}; did you mean {needed or keys[0]}={word}?")
        if key not in keys:
            meant = did_you_mean(key, keys, f"; the keys are {', '.join(keys)}", cutoff=0.5)
            raise ConfigError(f"unknown key {key}{meant}")
        values[key] = with_home(value)
    if needed and not values.get(needed):
        raise ConfigError(f"{needed} is missing: add {needed}={meaning}")
    return values
