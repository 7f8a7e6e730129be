"""`python -m dpo_kit dashboard project=…`: a saved wandb workspace that shows a sweep; needs the extra `dashboard`.

The runs must be on a server already: this only says how to show them. Every save makes a new view with an address of
its own; views saved before are left alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_kit.config.limits import missing_package
from dpo_kit.config.tools import Values, parse, run_tool
from dpo_kit.errors import ConfigError, DpoKitError
from dpo_kit.run.measures import kl_keys
from dpo_kit.run.redact import redact_text
from dpo_kit.run.tracking import STEP

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

KEYS = ("project", "entity", "group", "name")
USAGE = """\
usage: python -m dpo_kit dashboard project=NAME [key=value] …

  project=NAME     the wandb project that holds the runs (tracking.project)
  entity=NAME      the user or team that owns it (default: yours)
  group=NAME       only the runs of this group: a sweep's group is the name of its folder (default: every run)
  name=TEXT        what the saved view is called

Saves a wandb workspace and prints its address. It needs an API key (wandb login) and the extra dashboard.
"""
ELSEWHERE = (
    "without an account, `wandb leet` shows an offline run in the terminal; metrics.jsonl, report.png and a sweep's "
    "summary.md and frontier.png hold the same numbers"
)
ACCURACY, MARGIN, GOLD = "probe/accuracy", "probe/margin_nats", "gold/reward"
KL_REVERSE, _ = kl_keys("reverse")  # k1 stands beside rb only while a run trains
CURVES: dict[str, tuple[str, ...]] = {
    "Preference margin (nats)": (MARGIN,),
    "Implicit reward (beta times log-ratio)": ("probe/reward_chosen", "probe/reward_rejected"),
    "KL forward (nats per answer)": kl_keys("forward"),
    "Accuracy on held-out pairs": (ACCURACY,),
}
MOST_RUNS = 100  # a panel's own limit of 10 hides part of a sweep over methods or seeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where the server does not take the workspace, 2 where arguments, extra or key are missing."""
    return run_tool("dashboard", USAGE, arguments, print_address)


def print_address(arguments: Sequence[str]) -> None:
    """Save the workspace that `arguments` ask for and print where it is.

    Raises ConfigError, and DpoKitError where the server does not take it.
    """
    values = parse_words(arguments)
    if fault := missing_package("a saved workspace", "wandb_workspaces"):
        raise ConfigError(fault)
    require_key()
    try:
        address = save(values)
    except Exception as error:  # whatever wandb raises: a lost network, a project that is not there
        text = " ".join(str(error).split()) or "no message"
        reason = redact_text(f"{type(error).__name__}: {text[:200]}")
        raise DpoKitError(
            f"the workspace was not saved ({reason}); are the network, project and entity right?"
        ) from error
    sys.stdout.write(f"{address}\n")


def parse_words(arguments: Sequence[str]) -> Values:
    """{key: value} of the command line. Raises ConfigError."""
    return parse(arguments, KEYS, needed="project", meaning="NAME, the wandb project of the runs (tracking.project)")


def require_key() -> None:
    """ConfigError where wandb knows no API key; asks nobody for one, and no server."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))  # the address is printed here, once
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb refuses the API key ({redact_text(str(error))}): wandb login --relogin") from error
    if not known:
        raise ConfigError(f"no wandb API key: run `wandb login` or set WANDB_API_KEY; {ELSEWHERE}")


def save(values: Mapping[str, str]) -> str:
    """Save the workspace that `values` ask for; returns its address."""
    import wandb

    api = wandb.Api()
    entity = values.get("entity") or api.settings["entity"] or api.default_entity
    if not entity:
        raise ConfigError("entity is not known to wandb: add entity=NAME, the user or team that owns the project")
    workspace = build_workspace(values["project"], entity, group=values.get("group"), name=values.get("name"))
    return str(workspace.save().url)


def build_workspace(project: str, entity: str, *, group: str | None = None, name: str | None = None) -> Workspace:
    """The workspace, not saved: a section that compares runs (a point, line or bar for each), one with their curves
    (for each beta the mean of its runs, and how far they lie apart), one for the embedded lab.

    It shows training runs only (a sweep's summary has no beta), those of `group` where one is given. ConfigError where
    wandb refuses `name`.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from pydantic import ValidationError

    by_beta = {"groupby": wr.Config("beta"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    compared = [
        _scatter("KL against margin, by beta", MARGIN),
        _coordinates("From beta to margin", ACCURACY, MARGIN),
        wr.BarPlot(title="Accuracy by beta", metrics=[f"final/{ACCURACY}"], max_bars_to_show=MOST_RUNS, **by_beta),
    ]
    curves = [
        wr.LinePlot(title=title, x=STEP, y=list(keys), max_runs_to_show=MOST_RUNS, **by_beta)
        for title, keys in CURVES.items()
    ]
    # runs on real data have no gold reward, and an axis without values would hide them
    gold = [
        _scatter("KL against gold reward, by beta", GOLD),
        _coordinates("From beta to gold reward", ACCURACY, MARGIN, GOLD),
    ]
    sections = {"Sweep": compared, "Curves": curves, "Embedded lab, where the truth is known": gold}
    letters = re.sub(r"[^\w.-]+", " ", group or project).strip()  # wandb takes no = or + for a letter of a name
    shown = [ws.Metric("JobType") == "train", *([ws.Metric("Group") == group] if group else [])]
    try:
        return ws.Workspace(
            name=name or f"beta in {letters}",
            entity=entity,
            project=project,
            sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections.items()],
            settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=MOST_RUNS),
            runset_settings=ws.RunsetSettings(filters=shown),
        )
    except ValidationError as error:
        raise ConfigError(f"name must be without emoji and signs such as = or +, got {name}") from error


def _scatter(title: str, key: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    x, y = (wr.SummaryMetric(f"final/{of}") for of in (KL_REVERSE, key))
    return wr.ScatterPlot(title=title, x=x, y=y, z=wr.Config("beta"), log_z=True)


def _coordinates(title: str, *keys: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    column = wr.ParallelCoordinatesPlotColumn
    ends = [column(metric=wr.SummaryMetric(f"final/{key}"), display_name=key) for key in (KL_REVERSE, *keys)]
    settings = [column(metric=wr.Config("method.name"), display_name="method")]
    settings.append(column(metric=wr.Config("beta"), display_name="beta", log=True))
    return wr.ParallelCoordinatesPlot(title=title, columns=[*settings, *ends])


if __name__ == "__main__":
    sys.exit(main())
