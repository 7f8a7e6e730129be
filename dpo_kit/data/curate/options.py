"""The options of `python -m dpo_kit data` (conf/tool/data.yaml), checked."""

import time
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dpo_kit.config.places import claim
from dpo_kit.config.settings import FormName, Strict


class Curate(Strict):
    """Which rows are left out; None or False turns a filter off."""

    min_agreement: float | None = Field(default=0.7, ge=0, le=1)
    drop_ties: bool = True
    min_gap: NonNegativeFloat | None = 0.0
    min_ratio: PositiveFloat | None = None
    drop_contradictions: bool = True
    drop_leaks: bool = True
    drop_duplicates: bool = True
    balance_length: bool = False
    per_source: PositiveInt | None = None
    source: str = "source"
    hardest: PositiveInt | None = None


class Convert(Strict):
    """To which rows, and which pairs several scored answers make."""

    schema_: FormName | None = Field(default=None, alias="schema")  # what data.form says
    to: Literal["pairs", "unary"] = "pairs"
    pairing: Literal["best_worst", "best_random", "all"] = "best_worst"
    min_gap: NonNegativeFloat = 0.0
    threshold: float | None = None


class Tool(Strict):
    """What `python -m dpo_kit data` does and where it writes."""

    mode: Literal["check", "curate", "convert", "build"]
    out: str | None
    curate: Curate
    convert: Convert
    words: tuple[str, ...] = ()  # that were typed, for the command to type next

    def claim_folder(self) -> Path:
        """Where to write: `out`, else a time stamp that no other start has."""
        return Path(self.out) if self.out else claim(Path(time.strftime("outputs/data-%Y%m%d-%H%M%S")))
