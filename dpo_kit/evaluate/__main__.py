"""`python -m dpo_kit evaluate`: is a policy better than its reference, at what, and how sure is that?"""

import contextlib
import io
import logging
import sys
import textwrap
from collections.abc import Sequence

from dpo_kit.config.compose import CONF
from dpo_kit.config.help import keys_of
from dpo_kit.config.places import refuse_unwritable
from dpo_kit.config.tools import run_tool, usage
from dpo_kit.errors import ConfigError, DpoKitError, EvaluationError
from dpo_kit.evaluate.evaluation import asked_parts, evaluate, show, show_line
from dpo_kit.evaluate.job import Job, plan, refuse_silent_servers
from dpo_kit.run.quiet import quiet_imports

log = logging.getLogger("dpo_kit.evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where something is missing or failed, 2 where the arguments are refused."""
    text = (CONF / "tool" / "evaluate.yaml").read_text(encoding="utf-8")
    keys = textwrap.indent(text[text.index("run: null") :], "  ")
    keys += keys_of("judge", "llm", "reward_model", "gold", "human")
    return run_tool("evaluate", usage(__file__) + keys, arguments, work)


def work(arguments: Sequence[str]) -> None:
    """Do what Hydra overrides ask for. EvaluationError where an evaluation is not complete."""
    quiet_imports()
    jobs = plan(arguments)
    for job in jobs:
        refuse_unwritable("sweep" if job.options.sweep else "out", job.folder)
    asked_parts(jobs[0])
    refuse_silent_servers(jobs[0])
    with contextlib.redirect_stdout(io.StringIO()):  # transformers prints while it is imported
        import dpo_kit.trainer.held_out  # noqa: F401
    if jobs[0].options.sweep:
        evaluate_sweep(jobs)
        return
    result = evaluate(jobs[0])
    show(jobs[0], result)
    if result["status"] == "partial":
        raise EvaluationError(f"some answers or verdicts are missing: {result['next']}")


def evaluate_sweep(jobs: Sequence[Job]) -> None:
    """Each run; one that cannot be evaluated stops no other. Then the sweep's summary and choice anew."""
    from rich.console import Console

    from dpo_kit.sweep.summary import report, show_summary

    console, missing = Console(), []
    for job in jobs:
        try:
            result = evaluate(job)
        except (DpoKitError, OSError) as error:
            if len(jobs) == 1 or isinstance(error, ConfigError):
                raise
            log.warning("%s cannot be evaluated: %s", job.policy.name, error)
            missing.append(f"{job.policy.name} ({type(error).__name__}: {error})")
            continue
        show_line(job, result, console)
        missing += [job.policy.name] if result["status"] == "partial" else []
    summary = show_summary(str(jobs[0].options.sweep))
    if jobs[0].tracking.reporter == "wandb" and (summary.sweep_dir / "wandb_id").exists():
        report(summary, jobs[0].tracking)
    if missing:
        raise EvaluationError(f"{len(missing)} of {len(jobs)} runs lack something: {'; '.join(missing)}")


if __name__ == "__main__":
    sys.exit(main())
