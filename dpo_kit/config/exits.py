"""How a command ends: in an exit code, and one line that says why."""

import sys
from collections.abc import Callable, Sequence

from dpo_kit.errors import ConfigError, DataError, DpoKitError, ModelError
from dpo_kit.run.redact import redact_text, refuse_secrets

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def guard(name: str, words: Sequence[str], work: Callable[[], None]) -> int:
    """Exit code of `work`: 0 done, 1 failed, 2 refused (so is a secret in `words`), 130 Ctrl-C; one line says why."""
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
