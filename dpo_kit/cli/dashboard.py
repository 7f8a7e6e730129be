"""`python -m dpo_kit dashboard project=…`: a saved wandb workspace that shows a sweep; needs the extra `dashboard`.

The runs must be on a server already: this only says how to show them. Every save makes a new view with an address of
its own; views saved before are left alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpo_kit.config.limits import missing_package
from dpo_kit.config.tools import Values, parse, run_tool, usage
from dpo_kit.errors import ConfigError, DpoKitError
from dpo_kit.run.measures import KLS, MEASURE
from dpo_kit.run.redact import redact_text
from dpo_kit.run.tracking import STEP

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

KEYS = ("project", "entity", "group", "name")
ACCURACY, MARGIN, GOLD = "probe/accuracy", "probe/margin_nats", "gold/reward"
KL_REVERSE, _ = KLS["reverse"]  # k1 stands beside rb only while a run trains
CURVES: dict[str, tuple[str, ...]] = {
    MEASURE[MARGIN].title: (MARGIN,),
    "Implicit reward (beta times log-ratio)": ("probe/reward_chosen", "probe/reward_rejected"),
    "KL forward (nats per answer)": KLS["forward"],
    MEASURE[ACCURACY].title: (ACCURACY,),
}
MOST_RUNS = 100  # a panel's own limit of 10 hides part of a sweep over methods or seeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where the server does not take the workspace, 2 where arguments, extra or key are missing."""
    return run_tool("dashboard", usage(__file__), arguments, print_address)


def parse_words(arguments: Sequence[str]) -> Values:
    """{key: value} of the command line. Raises ConfigError."""
    return parse(arguments, KEYS, needed="project", meaning="NAME, the wandb project of the runs (tracking.project)")


def print_address(arguments: Sequence[str]) -> None:
    """Save the workspace that `arguments` ask for and print its address. ConfigError; DpoKitError: of the server."""
    values = parse_words(arguments)
    if fault := missing_package("a saved workspace", "wandb_workspaces"):
        raise ConfigError(fault)
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))  # the address is printed here, once
    try:
        known = wandb.login(prompt=False, verify=False)  # asks nobody for a key, and no server
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb refuses the API key ({redact_text(str(error))}): wandb login --relogin") from error
    if not known:
        elsewhere = "without an account, `wandb leet` shows an offline run in the terminal"
        files = "metrics.jsonl, report.png and a sweep's summary.md and frontier.png hold the same numbers"
        raise ConfigError(f"no wandb API key: run `wandb login` or set WANDB_API_KEY; {elsewhere}; {files}")
    try:
        api = wandb.Api()
        entity = values.get("entity") or api.settings["entity"] or api.default_entity
        if not entity:
            raise ConfigError("entity is not known to wandb: add entity=NAME, the user or team that owns the project")
        workspace = build_workspace(values["project"], entity, group=values.get("group"), name=values.get("name"))
        address = workspace.save().url
    except ConfigError:
        raise
    except Exception as error:  # whatever wandb raises: a lost network, a project that is not there
        reason = redact_text(f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no message'}")
        asked = "are the network, project and entity right?"
        raise DpoKitError(f"the workspace was not saved ({reason}); {asked}") from error
    sys.stdout.write(f"{address}\n")


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
    column = wr.ParallelCoordinatesPlotColumn

    def final(key: str) -> Any:
        return wr.SummaryMetric(f"final/{key}")

    def scatter(title: str, key: str) -> Any:
        return wr.ScatterPlot(title=title, x=final(KL_REVERSE), y=final(key), z=wr.Config("beta"), log_z=True)

    def coordinates(title: str, *keys: str) -> Any:
        columns = [column(metric=wr.Config("method.name"), display_name="method")]
        columns.append(column(metric=wr.Config("beta"), display_name="beta", log=True))
        columns += [column(metric=final(key), display_name=key) for key in (KL_REVERSE, *keys)]
        return wr.ParallelCoordinatesPlot(title=title, columns=columns)

    sections = {
        "Sweep": [
            scatter("KL against margin, by beta", MARGIN),
            coordinates("From beta to margin", ACCURACY, MARGIN),
            wr.BarPlot(title="Accuracy by beta", metrics=[f"final/{ACCURACY}"], max_bars_to_show=MOST_RUNS, **by_beta),
        ],
        "Curves": [
            wr.LinePlot(title=title, x=STEP, y=list(keys), max_runs_to_show=MOST_RUNS, **by_beta)
            for title, keys in CURVES.items()
        ],
        "Embedded lab, where the truth is known": [  # real data have no gold reward: empty axes would hide their runs
            scatter("KL against gold reward, by beta", GOLD),
            coordinates("From beta to gold reward", ACCURACY, MARGIN, GOLD),
        ],
    }
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


if __name__ == "__main__":
    sys.exit(main())
