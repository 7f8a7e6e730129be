"""What a build needs of the composed config, checked before anything heavy is imported."""

from __future__ import annotations

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_kit.config.compose import NEEDS_JUDGE
from dpo_kit.config.explain import JUDGES, describe_fault, explain
from dpo_kit.config.places import data_faults, judge_faults, model_faults, rows_faults, weights_faults
from dpo_kit.config.settings import Build, Data, Judge, LocalAnswers, Model, ServerAnswers, Strict
from dpo_kit.errors import ConfigError

PARTS = ("model", "data", "judge", "build")


class Plan(Strict):
    """The parts of a config that a build needs."""

    seed: int
    model: Model
    data: Data
    judge: Judge
    build: Build
    out: str | None


def check_plan(cfg: DictConfig) -> Plan:
    """The parts of `cfg` that a build needs, typed. ConfigError lists every fault, and models and files that are not
    there.
    """
    try:
        values = {name: OmegaConf.to_container(cfg[name], resolve=True, throw_on_missing=True) for name in PARTS}
        if cfg.build.votes:
            values["judge"] = {"kind": "human"}  # they have judged already: nobody is asked
        elif cfg.judge and cfg.judge.get("kind") == "gold" and cfg.judge.module is None:
            raise ConfigError(f"data.gold is null, and mode=build {NEEDS_JUDGE}")
        plan = Plan(seed=cfg.seed, out=cfg.out, **values)  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise explain(error) from error
    except pydantic.ValidationError as error:
        known = {f"judge.{name}" for judge in JUDGES for name in judge.model_fields}
        known |= {f"build.{name}" for name in Build.model_fields} | {f"data.{name}" for name in Data.model_fields}
        known |= {f"build.answers.{name}" for name in (*LocalAnswers.model_fields, *ServerAnswers.model_fields)}
        raise ConfigError("\n".join(describe_fault(fault, sorted(known)) for fault in error.errors())) from error
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
