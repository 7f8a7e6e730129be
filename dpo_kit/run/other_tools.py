"""What users of other tools type, as overrides of ours."""

from collections.abc import Sequence
from pathlib import Path

from dpo_kit.errors import ConfigError
from dpo_kit.run.files import read_json
from dpo_kit.run.words import override

FILE = Path(__file__).with_suffix(".json")  # our key: what other tools call it
MEANT: dict[str, str] = {name: key for key, names in read_json(FILE).items() for name in names.split()}


def meant(key: str) -> str | None:
    """Our key for one that users of other tools type, with or without a group before it; None for any other."""
    return MEANT.get(key.rpartition(".")[2].replace("-", "_").lower())


def refuse_dashes(words: Sequence[str], flags: Sequence[str]) -> None:
    """ConfigError for `flags` of a command line `words` that are none of ours: what was meant as an override."""
    for flag in (word for word in flags if word.startswith("-")):
        key, equals, value = flag.lstrip("-").partition("=")
        key, after = key.replace("-", "_"), words[words.index(flag) + 1 :][:1]
        if not equals:
            value = after[0] if after and "=" not in after[0] and not after[0].startswith("-") else "…"
        raise ConfigError(f"overrides are key=value without dashes: {override(meant(key) or key, value)}")
