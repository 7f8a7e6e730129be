"""How a command ends: its exit code, and what is wrong in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dpo_kit.errors import ConfigError, DataError, DpoKitError, ModelError
from dpo_kit.run.redact import redact_text, refuse_secrets

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


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
