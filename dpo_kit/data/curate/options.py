"""The options of `python -m dpo_kit data` (conf/tool/data.yaml), checked. Whole rules are refused here, early."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dpo_kit.config.settings import FormName, Strict

RATIO = 1.5  # least ratio of ratings on a ratio scale


class Curate(Strict):
    """Which rows are left out; None or False turns a filter off."""

    min_agreement: float | None = Field(default=0.7, ge=0, le=1)
    drop_ties: bool = True
    min_gap: NonNegativeFloat | None = 0.0
    scale: Literal["interval", "ratio"] = "interval"
    min_ratio: PositiveFloat | None = None
    drop_contradictions: bool = True
    drop_leaks: bool = True
    drop_duplicates: bool = True
    balance_length: bool = False
    per_source: PositiveInt | None = None
    source: str = "source"
    hardest: PositiveInt | None = None

    @model_validator(mode="after")
    def _ratio_needs_a_zero(self) -> "Curate":
        if self.min_ratio is not None and self.scale == "interval":
            raise ValueError(
                "curate.min_ratio means something on a ratio scale only: stars and 1-to-10 ratings have no zero that "
                "means none, so that adding 1 to all of them would change every ratio. Use curate.min_gap, or say "
                "curate.scale=ratio where 0 does mean none"
            )
        return self

    @property
    def least_ratio(self) -> float | None:
        """The ratio asked for: none on an interval scale."""
        return None if self.scale == "interval" else self.min_ratio or RATIO


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
