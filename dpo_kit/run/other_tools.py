"""What users of other tools type for our keys (other_tools.json), so that a refusal can name the one that is meant."""

from pathlib import Path

from dpo_kit.run.files import read_json

OURS: dict[str, str] = read_json(Path(__file__).with_suffix(".json"))  # our key: what others type
MEANT = {name: key for key, names in OURS.items() for name in names.split()}


def meant(key: str) -> str | None:
    """Our key for one that users of other tools type, with or without a group before it; None for any other."""
    return MEANT.get(key.rpartition(".")[2].replace("-", "_").lower())
