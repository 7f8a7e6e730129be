"""What a command line is about to sweep: every job composed and checked, the directories named. Nothing is written."""

import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_kit.config.compose import check, compose_unchecked, without_hydra
from dpo_kit.config.explain import explain
from dpo_kit.config.identity import comparable, refuse_other_run, sweep_id
from dpo_kit.config.limits import idle_faults, missing_package
from dpo_kit.config.places import refuse_unwritable
from dpo_kit.config.settings import Settings, Tracking
from dpo_kit.errors import ConfigError
from dpo_kit.model.origin import refuse_unusable
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.lock import refuse_held
from dpo_kit.run.processes import launcher, world_size
from dpo_kit.run.words import again, quote
from dpo_kit.sweep.choice.runs import read_runs

SWEEP_ID = "${dpo_kit.sweep_id:}"
OPTION = "beta-sweep"
LOCAL = ("processes", "basic")  # launchers whose jobs run on this machine


@dataclass(frozen=True)
class PlannedJob:
    """One job of a sweep before it runs: its overrides, what they say, its directory's name."""

    overrides: list[str]
    settings: Settings
    subdir: str | None  # None: known only when it is launched


@dataclass(frozen=True)
class Plan:
    """A sweep that is about to run: the overrides that name its directories, where it writes, how it is tracked, if its
    jobs run on this machine (`local`), and those that are known before they run.
    """

    named: list[str]
    directory: Path
    tracking: Tracking
    local: bool
    jobs: Sequence[PlannedJob] = ()


def refuse_sweep(overrides: Sequence[str]) -> None:
    """ConfigError: each job of a sweep is a process of its own, so the launcher belongs inside it."""
    if world_size() == 1:
        return
    typed = shlex.join([*launcher(), "-m", "dpo_kit", *overrides])
    outside = again(typed, None, "-m", **{"hydra.launcher.devices_per_job": str(world_size())})
    raise ConfigError(
        f"a sweep inside a launcher would run {world_size()} times: sweep outside, and let each job be started by it: "
        f"{outside}"
    )


def plan_sweep(overrides: Sequence[str], search: Sequence[str], config_name: str) -> Plan:
    """Check every job asked for (of a sweeper that draws its values, such as Optuna, what is fixed). ConfigError."""
    parsed = parse_overrides(overrides)
    swept, fixed = ([str(o.input_line) for o in parsed if o.is_sweep_override() is wanted] for wanted in (True, False))
    base = compose_unchecked([*search, *fixed], config_name, with_hydra=True)
    package = ".".join(str(base.hydra.launcher.get("_target_", "")).split(".")[:2])
    if package == "hydra_plugins.hydra_ray_launcher" and (fault := missing_package("hydra/launcher=ray", package)):
        raise ConfigError(fault)
    params = [f"{key}={value}" for key, value in (base.hydra.sweeper.get("params") or {}).items()]
    if not base.hydra.sweeper.get("_target_", "").endswith(".BasicSweeper"):
        grid = [*params, *swept]
        content = {"fixed": comparable(check(without_hydra(base))), "swept": sorted(grid)}
        return _plan(base, [content], _add_axes(base, grid, prefix="${hydra.job.num}-"))
    jobs = [compose_job(job, search, config_name) for job in split_jobs([*params, *overrides])]
    configs = [comparable(job.settings) for job in jobs]
    for number, job in enumerate(jobs):
        if configs[number] in configs[:number]:
            raise ConfigError(f"two jobs of this sweep are the same run ({' '.join(job.overrides)}): name each once")
    if everywhere := set.intersection(*({*idle_faults(job.settings, job.overrides)} for job in jobs)):
        raise ConfigError("\n".join(sorted(everywhere)))
    for job in jobs:
        refuse_unusable(job.settings)
    pushed = Counter(job.settings.trl["hub_model_id"] for job in jobs if job.settings.trl["push_to_hub"])
    if shared := [name for name, count in pushed.items() if count > 1]:
        raise ConfigError(
            f"trl.hub_model_id={shared[0]} is one repository for {pushed[shared[0]]} jobs, which would push one over "
            "the other: put into its name what is swept, 'trl.hub_model_id=org/name-beta${beta}-seed${seed}', or "
            "export the run that is chosen"
        )
    names, axes = [job.subdir for job in jobs], []
    if None not in names and len({*names}) < len(names):  # two jobs would share a directory: name further axes in it
        values: dict[str, set[str]] = {}
        for key, _, value in (word.partition("=") for job in jobs for word in job.overrides):
            values.setdefault(key.lstrip("+"), set()).add(value)
        last_parts = {key: {v.strip("'\"").rstrip("/").rpartition("/")[2] for v in values[key]} for key in values}
        axes = _add_axes(base, swept, whole=[key for key in values if len(last_parts[key]) < len(values[key])])
    plan = _plan(base, configs, axes)
    if plan.named and (plan.directory.is_dir() or jobs[0].settings.dry_run):
        jobs = [compose_job([*job.overrides, *plan.named], search, config_name) for job in jobs]
    for job in jobs:
        if job.subdir is not None:
            refuse_other_run(RunDirectory(plan.directory / job.subdir), job.settings, "hydra.sweep.dir")
    planned = {job.subdir for job in jobs}
    runs = read_runs(plan.directory) if None not in planned and any(plan.directory.glob("*/manifest.json")) else []
    if left := [run.path for run in runs if not run.finished and run.path not in planned]:
        raise ConfigError(
            f"hydra.sweep.dir={plan.directory} holds {', '.join(left)}, not ended and no job of this command: "
            "give the command that it came from again, or choose another hydra.sweep.dir"
        )
    return replace(plan, jobs=jobs)


def _plan(base: DictConfig, configs: list[dict[str, Any]], subdirectories: list[str]) -> Plan:
    """Where the sweep writes: its directory is named by a hash of `configs` unless somebody has named it."""
    written: Any = OmegaConf.to_container(base.hydra.sweep, resolve=False)
    named = written["dir"].replace(SWEEP_ID, sweep_id(configs))
    directory = Path(OmegaConf.create({"at": named, "hydra": base.hydra}).at)
    refuse_unwritable("hydra.sweep.dir", directory)
    refuse_held(directory)
    local = base.hydra.runtime.choices["hydra/launcher"] in LOCAL
    words = [f"hydra.sweep.dir={quote(named)}"] if SWEEP_ID in written["dir"] else []
    if not local:  # a cluster's job may start in another folder and without this process's environment: name both
        group = os.environ.get("WANDB_RUN_GROUP", directory.name)
        words = [f"hydra.sweep.dir={quote(str(directory.absolute()))}"]
        words.append(f"++hydra.job.env_set.WANDB_RUN_GROUP={quote(group)}")
    return Plan([*words, *subdirectories], directory, Tracking(**base.tracking), local)


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of `overrides`; ConfigError where it cannot read them, or where several grids are asked for."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise explain(error, overrides) from error
    if grids := [o.input_line for o in parsed if o.is_sweep_override() and o.key_or_group == OPTION]:
        raise ConfigError(f"beta-sweep takes one option, got {grids[0]}: list the values instead, beta=0.05,0.1,0.5")
    return parsed


def split_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job, as Hydra's own sweeper combines them: later words win over earlier ones."""
    try:
        batches = BasicSweeper.split_arguments(parse_overrides(overrides), None)
    except Exception as error:  # HydraException, and what its sweeps of numbers raise
        raise explain(error, overrides) from error
    return [list(job) for batch in batches for job in batch]


def compose_job(overrides: list[str], search: Sequence[str], config_name: str) -> PlannedJob:
    """The job of `overrides`, checked."""
    cfg, subdir = compose_unchecked([*search, *overrides], config_name, with_hydra=True), None
    with contextlib.suppress(OmegaConfBaseException):  # speaks of the job's number, say
        subdir = str(cfg.hydra.sweep.subdir)
    if subdir is not None and (Path(subdir).is_absolute() or ".." in Path(subdir).parts):
        raise ConfigError(f"hydra.sweep.subdir must stay inside hydra.sweep.dir, got {subdir}: name a plain folder")
    return PlannedJob(overrides, check(without_hydra(cfg)), subdir)


def _add_axes(base: DictConfig, swept: Sequence[str], prefix: str = "", whole: Sequence[str] = ()) -> list[str]:
    """The name of a job's directory with the `swept` axes in it: of paths the last part, for `whole` keys all of it."""
    written: Any = OmegaConf.to_container(base.hydra.sweep, resolve=False)
    name = prefix + written["subdir"]
    for key in (word.partition("=")[0].lstrip("+") for word in swept):
        if "${" + key + "}" in written["subdir"] or key.startswith(("method", "hydra")):
            continue
        short = key.rpartition(".")[2].rpartition("/")[2]
        resolver = "path_name" if key in whole else "file_name"
        node = f"hydra.runtime.choices.{key}" if key in base.hydra.runtime.choices else key  # a group's choice
        name += f"-{short}${{dpo_kit.{resolver}:${{{node}}}}}"
    return [f"hydra.sweep.subdir={quote(name)}"]
