"""The command line: refuse early, then let Hydra run `train`. No torch, no trl until a run really starts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import runpy
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dpo_kit.config.compose import CONF, check, compose_unchecked, refuse_idle, register, search_path, without_hydra
from dpo_kit.config.exits import guard
from dpo_kit.config.identity import refuse_other_run
from dpo_kit.config.places import claim, refuse_unwritable
from dpo_kit.config.settings import Endpoint, Settings
from dpo_kit.errors import ConfigError, DataError, ModelError, did_you_mean
from dpo_kit.model.origin import refuse_unusable
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.lock import refuse_held
from dpo_kit.run.processes import agree, is_writer, world_size
from dpo_kit.run.quiet import quiet_imports
from dpo_kit.run.redact import redact_text
from dpo_kit.run.words import override, readable

if TYPE_CHECKING:
    from dpo_kit.sweep.launch.plan import Plan
    from dpo_kit.trainer.finish import Result

TERMINATED = 143
TOOLS = {
    **{name: f"dpo_kit.cli.{name}" for name in ("dashboard", "env", "plan")},
    **{name: f"dpo_kit.{name}" for name in ("data", "evaluate", "export", "sweep")},
}  # the modules of `python -m dpo_kit <tool>`
HYDRA_S = (".hydra", "dpo_kit.log", ".lock")  # in a run directory, before anything of the run itself
log = logging.getLogger("dpo_kit")
held: list[Exception] = []  # what the task raised


def main() -> None:
    """`python -m dpo_kit` and `dpo-kit`: exits 0 done, 1 failed, 2 refused, 130 on Ctrl-C, 143 on SIGTERM.

    `dpo-kit sweep …` is `python -m dpo_kit sweep …`, and so for each of TOOLS.
    """
    if not sys.flags.safe_path and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # where `python -m dpo_kit` finds modules of the user's own, `dpo-kit` does too
    if set(sys.argv[1:2]) & set(TOOLS):
        runpy.run_module(TOOLS[sys.argv.pop(1)], run_name="__main__", alter_sys=True)
        return
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        sys.stdout.write(f"dpo_kit {version('dpo-kit')}\n")
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own report
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/ray' is validated")  # our option's name too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # unwinds like Ctrl-C: the run says that it ended so
    sys.excepthook = _show_without_secrets
    sys.exit(guard("dpo_kit", sys.argv[1:], lambda: _work(read_arguments(sys.argv[1:]))))


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and overrides in any order, as Hydra, which reads `sys.argv` next, can read them. ConfigError."""
    if words and words[0].isidentifier() and (meant := did_you_mean(words[0], TOOLS)):
        raise ConfigError(f"there is no tool {words[0]}{meant}")

    def refuse(message: str) -> NoReturn:  # instead of eight lines of usage
        raise ConfigError(message)

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args, unknown = parser.parse_known_intermixed_args(words)  # as Hydra 1.4 does (facebookresearch/hydra#3053)
    if unknown:
        from dpo_kit.run.other_tools import refuse_dashes

        refuse_dashes(words, unknown)
    flags = [word for word in words if word not in args.overrides]
    args.overrides = readable(args.overrides) if not args.shell_completion else args.overrides
    sys.argv[1:] = [*flags, *args.overrides]
    return args


def _show_without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact_text("".join(traceback.format_exception(kind, error, trace))))


def _work(args: argparse.Namespace) -> None:
    if args.help:
        from dpo_kit.config.help import help_text

        sys.stdout.write(help_text(args.config_dir))
    elif args.shell_completion:
        if not set(os.environ.get("COMP_LINE", "").split()[1:2]) & set(TOOLS):  # Hydra knows nothing of a tool's words
            with contextlib.suppress(HydraException):  # silent in a word that it cannot read
                run()
    elif args.hydra_help or args.info:
        run()
    elif isinstance(start := refuse_early(args), Settings):
        quiet_imports()
        from dpo_kit.cli.plan import dry_run

        sweeps = args.multirun or means_multirun(args)
        dry_run(start, [] if sweeps else [word for word in args.overrides if not word.startswith("dry_run=")])
    elif start is None or isinstance(start, Path):
        _single(start)
    else:
        _sweep(start)


def _single(directory: Path | None) -> None:
    """Hydra's run of one job. A start that is refused leaves no folder that was not there before."""
    new = directory is not None and not any(directory.glob("*"))
    try:
        run()
        if held:
            raise held.pop()
    except (ConfigError, DataError, ModelError):
        if new and directory and all(entry.name in HYDRA_S for entry in directory.glob("*")):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _sweep(plan: Plan) -> None:
    """Run the sweep `plan`; its summary is written whether all jobs ended well or not."""
    try:
        run()
    except Exception as error:  # a cluster's launchers raise the error of the first job that failed
        if not (plan.local and isinstance(error, ConfigError)):
            _conclude(plan)
        raise
    _conclude(plan)


def _conclude(plan: Plan) -> None:
    from dpo_kit.sweep.summary import conclude

    conclude(plan.directory, plan.tracking, measure=plan.local)


def means_multirun(args: argparse.Namespace) -> bool:
    """Whether `beta-sweep=<option>` asks for a sweep without -m: Hydra 1.4 lets no option say so itself."""
    flags = (args.help, args.hydra_help, args.cfg, args.info, args.shell_completion, args.multirun, args.run)
    if any(flags) or any(word.startswith("hydra.mode=") for word in args.overrides):
        return False
    chosen = [word.split("=", 1)[1] for word in args.overrides if word.lstrip("+").startswith("beta-sweep=")]
    return bool(chosen) and chosen[-1] not in ("none", "null", "")


def refuse_early(args: argparse.Namespace) -> Plan | Settings | Path | None:
    """Compose and check what is about to run, before Hydra writes its first file; the plan where it is a sweep, the
    settings where it is a dry run, else the run directory; None where only the config is asked for.

    Directories that are chosen here are added to the command line that Hydra will read. Raises ConfigError.
    """
    search, name = search_path(args.config_dir), args.config_name or "config"
    implied = means_multirun(args)
    if args.cfg or not (args.multirun or implied or "hydra.mode=MULTIRUN" in args.overrides):
        cfg = compose_unchecked([*search, *args.overrides], name, with_hydra=True)
        settings = check(without_hydra(cfg))
        if args.cfg:
            return None
        refuse_idle(settings, args.overrides)
        refuse_unusable(settings)
        refuse_silent_judges(settings)
        return settings if settings.dry_run else take_directory(args, cfg, settings)
    from dpo_kit.sweep.launch.plan import plan_sweep, refuse_sweep

    refuse_sweep(args.overrides)
    plan = plan_sweep(args.overrides, search, name)
    if plan.local:  # a cluster's jobs may reach what this machine does not
        refuse_silent_judges(*(job.settings for job in plan.jobs))
    if plan.jobs and plan.jobs[0].settings.dry_run:
        lines = [f"{len(plan.jobs)} jobs, into {plan.directory}:", *(f"  {job.subdir}" for job in plan.jobs)]
        sys.stdout.write("\n".join([*lines, "", "the first of them:", ""]))
        return plan.jobs[0].settings
    _add_words(args, plan.named, *(["--multirun"] if implied else []))
    return plan


def refuse_silent_judges(*runs: Settings) -> None:
    """ConfigError where nobody answers at the address of a run's judge; each address is asked once."""
    judges = [run.judge for run in runs if isinstance(run.judge, Endpoint)]
    for judge in {(judge.base_url, judge.api_key_env): judge for judge in judges}.values():
        from dpo_kit.judge.server import refuse_silent

        refuse_silent("judge", judge)


def take_directory(args: argparse.Namespace, cfg: DictConfig, settings: Settings) -> Path:
    """The directory of a run, one for all its processes; a time stamp that is taken gets a number. ConfigError where it
    cannot be written, or is another run's.
    """
    directory = Path(str(cfg.hydra.run.dir))
    refuse_unwritable("hydra.run.dir", directory)
    stamped = "${now:" in str(OmegaConf.to_container(cfg.hydra.run, resolve=False))
    if not stamped:
        refuse_other_run(RunDirectory(directory), settings)
        refuse_held(directory)
    elif is_writer():
        directory = claim(directory)
    shared = agree(args.overrides, str(directory)) if world_size() > 1 else []
    _add_words(args, shared or ([override("hydra.run.dir", directory)] if stamped else []))
    return directory


def _add_words(args: argparse.Namespace, added: Sequence[str], *flags: str) -> None:
    """Put overrides and flags on the command line that Hydra will read; argparse wants the overrides in one piece."""
    given = [word for word in sys.argv[1:] if word not in args.overrides]
    sys.argv[1:] = [*given, *flags, *args.overrides, *added]


def task(cfg: DictConfig) -> float | None:
    """One run; returns what a sweeper may maximise: the held-out accuracy.

    Outside a sweep an error is held back, as Hydra would print a line of its own above ours.
    """
    hydra_config = HydraConfig.get()
    try:
        if not hydra_config.job.chdir:
            os.chdir(hydra_config.runtime.cwd)  # a Ray worker starts where its cluster was: paths may be relative
        directory = hydra_config.runtime.output_dir
        log.info("method=%s beta=%g seed=%d → %s", cfg.method.name, cfg.beta, cfg.seed, directory)
        with contextlib.redirect_stdout(io.StringIO()):  # transformers prints while it is imported
            from dpo_kit import train

        result = train(cfg, directory)
        if is_writer():
            show(result)
        return result.final.get("probe/accuracy")
    except Exception as error:
        if hydra_config.mode == RunMode.MULTIRUN:
            raise
        held.append(error)
        return None


run = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)


def show(result: Result) -> None:
    """The short table at the end, who compared how many fresh answers, what was noticed, the next command to type."""
    from rich.console import Console

    console = Console()
    say = partial(console.print, highlight=False, markup=False)
    if result.final:
        from dpo_kit.run.report.results import result_table

        console.print(result_table(dataclasses.asdict(result)))
    if judge := result.judge:
        coins = ", ".join(f"{count:,} {why}" for why, count in judge["coins"].items() if count)
        compared = f"{judge['comparisons']:,} times two fresh answers, compared by {judge['name']}"
        say(f"{compared}; decided by coin: {coins or 'none'}", soft_wrap=True)
    if result.published:
        from dpo_kit.run.report.results import sentences

        say("\n".join(sentences(result.published)))
    for finding in result.findings:
        say(finding["symptom"], style="bold")
        say(f"{finding['meaning']} {finding['remedy']}\n")
    say(f"run directory: {result.run_dir}\nnext: {result.next}", soft_wrap=True)


register()
