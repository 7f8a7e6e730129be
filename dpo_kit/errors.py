"""Every error that dpo_kit raises on purpose.

    DpoKitError
    ├── ConfigError (also ValueError)   a key, a value or a combination that cannot train as meant
    ├── DataError   (also ValueError)   a file, a row or a column that cannot be trained on
    ├── ModelError  (also ValueError)   weights, tokenizer or reference that do not fit
    ├── TrainingError                   training ended in a state that must not be kept
    ├── SweepError                      some jobs of a sweep did not end well; the others are complete
    ├── BuildError                      some pairs could not be built; the others are complete
    ├── EvaluationError                 some answers or verdicts could not be had; what is there is reported
    └── JudgeError                      a judge whose verdicts cannot be read

A message names the key (or file and line), the rule, the value found and the remedy.
"""

import difflib
from collections.abc import Iterable


class DpoKitError(Exception):
    """Base of all errors that dpo_kit raises on purpose; picklable, so that it crosses process borders."""


class ConfigError(DpoKitError, ValueError):
    """A key, a value or a combination of values that cannot train as meant."""


class DataError(DpoKitError, ValueError):
    """A file, a row or a column that cannot be trained on."""


class ModelError(DpoKitError, ValueError):
    """Weights, a tokenizer or a reference model that do not fit the run."""


class TrainingError(DpoKitError):
    """Training ended in a state that must not be kept, such as weights that are not finite."""


class SweepError(DpoKitError):
    """Some jobs of a sweep did not end well; the others are complete."""


class BuildError(DpoKitError):
    """Some pairs could not be built; the others are complete, and the same command tries again."""


class EvaluationError(DpoKitError):
    """Some answers or verdicts could not be had; what is there is reported, and the same command asks for the rest."""


class JudgeError(DpoKitError):
    """A judge whose verdicts cannot be read, so that what it decides says nothing."""


def did_you_mean(word: str, choices: Iterable[str], otherwise: str = "", *, count: int = 1, cutoff: float = 0.6) -> str:
    """“; did you mean NEAR?” with at most `count` of `choices` that look like `word`; `otherwise` where none does."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), by_lower, n=count, cutoff=cutoff)
    return f"; did you mean {' or '.join(by_lower[name] for name in near)}?" if near else otherwise
