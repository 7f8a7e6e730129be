"""The saved wandb workspace of a sweep: what it shows, what it refuses, and that a server gets it as it is meant."""

import json
import os
import subprocess
import sys

import pytest

from dpo_kit.cli import dashboard
from dpo_kit.errors import ConfigError
from dpo_kit.toy import TRAIN
from tests.fake_wandb import FakeWandb

KEY = "0123456789" * 4
NO_EXTRA = "needs the extra dashboard"


def run_dashboard(tmp_path, *words, **env):
    """The command as a user types it, on a machine without settings of wandb."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"NETRC": str(tmp_path / "no-netrc"), "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
    return subprocess.run(
        [sys.executable, "-m", "dpo_kit", "dashboard", *words],
        cwd=tmp_path,
        env=kept | own | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "project is missing: add project=NAME"),
        ("project=", "project is missing"),
        ("project=lab grup=sweep-1", "unknown key grup; did you mean group?"),
        ("project=lab beta=0.1", "unknown key beta; the keys are project, entity, group, name"),
        ("lab", "arguments are key=value, got lab; did you mean project=lab?"),
    ],
)
def test_arguments_that_are_not_understood_are_refused_with_what_was_probably_meant(words, said, capsys):
    assert dashboard.main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_help_needs_neither_extra_nor_key(capsys):
    assert dashboard.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key in dashboard.KEYS)


def test_without_the_extra_the_refusal_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dashboard.main(["project=lab"]) == 2
    assert "pip install 'wandb-workspaces<0.5," in capsys.readouterr().err


def test_without_a_key_it_says_so_and_what_to_use_instead(tmp_path):
    pytest.importorskip("wandb_workspaces", reason=NO_EXTRA)
    done = run_dashboard(tmp_path, "project=lab")
    assert done.returncode == 2 and done.stdout == ""
    assert "no wandb API key" in done.stderr and "wandb leet" in done.stderr and "report.png" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_key_that_cannot_be_one_is_refused_and_not_shown(tmp_path):
    pytest.importorskip("wandb_workspaces", reason=NO_EXTRA)
    done = run_dashboard(tmp_path, "project=lab", WANDB_API_KEY="short")
    assert done.returncode == 2 and "wandb refuses the API key" in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_wandb_does_not_take_is_refused():
    pytest.importorskip("wandb_workspaces", reason=NO_EXTRA)
    with pytest.raises(ConfigError, match="without emoji and signs such as ="):
        dashboard.build_workspace("lab", "team", name="beta=0.1")


# --- what it shows ------------------------------------------------------------------------------------------------


def spec(**given):
    """What would be sent, as plain containers."""
    pytest.importorskip("wandb_workspaces", reason=NO_EXTRA)
    model = dashboard.build_workspace("lab", "team", **given)._to_model()
    return json.loads(model.model_dump_json(by_alias=True, exclude_none=True))


def panels(whole):
    sections = whole["spec"]["section"]["panelBankConfig"]["sections"]
    return {panel["config"]["chartTitle"]: panel for section in sections for panel in section["panels"]}


def filters(whole):
    rules = whole["spec"]["section"]["runSets"][0]["filters"]["filters"]
    return [(rule["key"]["section"], rule["key"]["name"], rule["op"], rule["value"]) for rule in rules]


def test_kl_is_drawn_against_margin_with_beta_as_the_third_dimension():
    drawn = panels(spec())["KL against margin, by beta"]
    assert drawn["viewType"] == "Scatter Plot"
    config = drawn["config"]
    assert config["xAxis"] == "summary:final/probe/kl_reverse_rb_nats"
    assert config["yAxis"] == "summary:final/probe/margin_nats"
    assert (config["zAxis"], config["zAxisLogScale"]) == ("config:beta.value", True)


@pytest.mark.parametrize(
    ("title", "last"), [("From beta to margin", []), ("From beta to gold reward", ["gold/reward"])]
)
def test_parallel_coordinates_lead_from_method_and_beta_to_what_was_measured(title, last):
    drawn = panels(spec())[title]
    assert drawn["viewType"] == "Parallel Coordinates Plot"
    assert [column["accessor"] for column in drawn["config"]["columns"]] == [
        "config:method.value.name",
        "config:beta.value",
        *(f"summary:final/{key}" for key in ("probe/kl_reverse_rb_nats", "probe/accuracy", "probe/margin_nats", *last)),
    ]


def test_accuracy_is_a_bar_for_each_beta():
    drawn = panels(spec())["Accuracy by beta"]
    assert drawn["viewType"] == "Bar Chart"
    assert (drawn["config"]["metrics"], drawn["config"]["groupBy"]) == (["final/probe/accuracy"], "beta.value")


def test_margin_rewards_kl_and_accuracy_are_curves_over_steps_grouped_by_beta():
    curves = [panel["config"] for panel in panels(spec()).values() if panel["viewType"] == "Run History Line Plot"]
    assert {(curve["xAxis"], curve["groupBy"]) for curve in curves} == {("train/global_step", "beta.value")}
    assert [curve["metrics"] for curve in curves] == [
        ["probe/margin_nats"],
        ["probe/reward_chosen", "probe/reward_rejected"],
        ["probe/kl_forward_rb_nats", "probe/kl_forward_k1_nats"],
        ["probe/accuracy"],
    ]


def test_only_training_runs_are_shown_and_only_those_of_the_group_where_one_is_given():
    training = ("run", "jobType", "=", "train")
    assert filters(spec()) == [training]
    assert filters(spec(group="sweep-1")) == [training, ("run", "group", "=", "sweep-1")]


def test_a_view_is_named_after_the_group_in_letters_that_wandb_takes():
    assert spec(group="sweep=1+2")["displayName"] == "beta in sweep 1 2"
    assert spec(name="Tuesday")["displayName"] == "Tuesday"


def accessors(whole):
    """(where, path) of everything that the panels read."""
    for panel in panels(whole).values():
        config = panel["config"]
        axes = [config.get("xAxis"), config.get("yAxis"), config.get("zAxis")]
        for text in [*axes, *(column["accessor"] for column in config.get("columns", []))]:
            if text and ":" in text:
                yield tuple(text.split(":", 1))
        where = "history" if panel["viewType"] == "Run History Line Plot" else "summary"
        yield from ((where, key) for key in config.get("metrics", []))
        if "groupBy" in config:
            yield "config", config["groupBy"]


@pytest.mark.slow
def test_everything_that_the_panels_read_is_recorded_by_a_run(command, tmp_path):
    read = {*accessors(spec())} - {("history", "probe/kl_forward_k1_nats")}  # stands in where the other is missing
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:40]))
    small = ["trl.max_steps=2", "trl.per_device_train_batch_size=4", "callbacks.pairs=8", "callbacks.prompts=4"]
    done = command(*small, f"data.train={pairs}", "data.eval=null", "data.holdout=0.4", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr

    from tests.offline_wandb import log_files, read_offline

    (file,) = log_files(tmp_path / "run")
    found = read_offline(file)
    known = {("summary", key) for key in found.summary} | {("history", key) for row in found.history for key in row}
    known |= {("config", "beta.value")} if isinstance(found.config["beta"], float) else set()
    known |= {("config", "method.value.name")} if isinstance(found.config["method"]["name"], str) else set()
    assert read - known == set() and len(read) >= 10
    assert found.run.job_type == "train"


# --- a server -----------------------------------------------------------------------------------------------------


def test_a_server_gets_the_workspace_once_and_its_address_is_printed(tmp_path):
    pytest.importorskip("wandb_workspaces", reason=NO_EXTRA)
    with FakeWandb() as server:
        env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = run_dashboard(tmp_path, "project=lab", "group=sweep-1", **env)
    assert done.returncode == 0, done.stderr
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("someone", "lab", "beta in sweep-1")
    sent = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [len(section["panels"]) for section in sent] == [3, 4, 2]
    short = view["name"].removeprefix("nw-").removesuffix("-v")
    assert done.stdout.splitlines() == [f"{server.url}/someone/lab?nw={short}"]
    assert done.stderr == "" and KEY not in "".join(server.bodies)
    assert not (tmp_path / "wandb").exists()


def test_a_server_that_fails_is_named_without_a_traceback(tmp_path):
    pytest.importorskip("wandb_workspaces", reason=NO_EXTRA)
    with FakeWandb(404) as server:
        env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = run_dashboard(tmp_path, "project=lab", "entity=team", **env)
    assert done.returncode == 1 and done.stdout == ""
    assert "the workspace was not saved (" in done.stderr and "Traceback" not in done.stderr
