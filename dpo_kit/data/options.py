"""The options of `python -m dpo_kit data` (conf/tool/data.yaml) and of a build, checked before what is heavy loads."""

import time
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dpo_kit.config.building import Build, LocalAnswers, ServerAnswers
from dpo_kit.config.compose import NEEDS_JUDGE, resolve, typed
from dpo_kit.config.explain import JUDGES
from dpo_kit.config.places import claim, data_faults, judge_faults, model_faults, rows_faults, weights_faults
from dpo_kit.config.settings import Data, FormName, Judge, Model, Strict
from dpo_kit.errors import ConfigError


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


class Plan(Strict):
    """The parts of a config that a build needs."""

    seed: int
    model: Model
    data: Data
    judge: Judge
    build: Build
    out: str | None


def check_plan(cfg: DictConfig) -> Plan:
    """The parts of `cfg` that a build needs. ConfigError lists every fault, and models and files that are not there."""
    values = resolve(cfg, Plan.model_fields)
    if values["build"].get("votes"):
        values["judge"] = {"kind": "human"}  # they have judged already: nobody is asked
    elif (judge := values["judge"] or {}).get("kind") == "gold" and judge.get("module") is None:
        raise ConfigError(f"data.gold is null, and mode=build {NEEDS_JUDGE}")
    groups: dict[str, tuple[type[Strict], ...]]
    groups = {"judge": JUDGES, "build": (Build,), "data": (Data,), "build.answers": (LocalAnswers, ServerAnswers)}
    known = {f"{group}.{name}" for group, kinds in groups.items() for kind in kinds for name in kind.model_fields}
    plan = typed(Plan, values, sorted(known))
    build = plan.build
    faults = [*model_faults(plan.model), *judge_faults(plan.judge)]
    faults += data_faults(plan.data) if build.prompts is None and build.votes is None else []
    for source in build.answers:
        faults += weights_faults("build.answers: path", source.path) if isinstance(source, LocalAnswers) else []
    for name, path in (("prompts", build.prompts), ("votes", build.votes)):
        faults += rows_faults(f"build.{name}", path) if path else []
    if faults:
        raise ConfigError("\n".join(faults))
    return plan
