"""The options of `python -m dpo_kit evaluate` (conf/tool/evaluate.yaml), checked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from dpo_kit.config.settings import Endpoint, Judge, Strict
from dpo_kit.evaluate.benchmark_options import Alpaca, Domain, Failures, Harness, MTBench

Split = Literal["select", "test", "all"]


class WinRate(Strict):
    """Which prompts both sides answer, and how."""

    prompts: str | None
    limit: PositiveInt | None
    draws: PositiveInt
    temperature: NonNegativeFloat
    max_new_tokens: PositiveInt
    chunk: PositiveInt
    seed: NonNegativeInt
    opponent_seed: NonNegativeInt
    policy_server: Endpoint | None
    opponent_server: Endpoint | None


class Evaluate(Strict):
    """What is evaluated, against what, and where the findings go; `judge` None: no win rate.

    The options of a part that is not asked for are None.
    """

    run: str | None
    sweep: str | None
    policy: str | None
    reference: str | None
    against: str | None
    out: str | None
    parts: list[str] = Field(min_length=1)
    split: Split | None
    review: NonNegativeInt
    win_rate: WinRate
    judge: Judge | None
    gate: Harness | None
    alpaca_eval: Alpaca | None
    mt_bench: MTBench | None
    domain: Domain | None
    failures: Failures | None
