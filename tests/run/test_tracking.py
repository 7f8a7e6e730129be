"""wandb for real: offline runs are read back, online runs go to a small server on loopback."""

import logging
import os
import pty
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dpo_kit.config.compose import check, compose
from dpo_kit.run import tracking
from dpo_kit.run.directory import RunDirectory
from dpo_kit.trainer.recorder import start_tracking
from tests.fake_wandb import FakeWandb
from tests.offline_wandb import log_files, read_offline

pytestmark = pytest.mark.timeout(120)
KEY = "0123456789" * 4
CANARY = "hf_" + "canary" * 6


@pytest.fixture(autouse=True)
def clean_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings of this machine, and no wandb process left from one test to the next."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()
    yield
    wandb.teardown()


def start(run_dir: Path, **changes: Any) -> tracking.Tracker:
    arguments = {"config": {"beta": 0.1}, "project": "lab", "name": "dpo-b0.1-s0"} | changes
    return tracking.start(arguments.pop("config"), run_dir=run_dir, **arguments)


def use_server(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("dpo_kit")]


def files_under(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_an_offline_run_read_back_holds_config_group_rows_and_a_clean_exit(tmp_path: Path) -> None:
    config = {"beta": 0.1, "hub_token": "swordfish", "model": {"kwargs": {"note": CANARY}}}
    tracker = start(tmp_path, config=config, group="sweep-1", tags=["dpo", "beta-sweep"], entity="team")
    tracker.log({"loss": 0.69, "probe/kl_forward_rb_nats": 0.0, "note": "text"}, 0)
    tracker.log({"loss": float("nan")}, 10)
    tracker.summary({"final/probe/margin_nats": 4.5})
    tracker.notes("# a run\n\n![picture](report.png)\n\nend")
    tracker.finish(0)

    (path,) = log_files(tmp_path)
    found = read_offline(path)
    assert (found.run.project, found.run.run_group, found.run.job_type) == ("lab", "sweep-1", "train")
    assert (found.run.entity, found.run.display_name, found.run.run_id) == ("team", "dpo-b0.1-s0", tracker.run_id)
    assert sorted(found.run.tags) == ["beta-sweep", "dpo"]
    assert found.config["hub_token"] == "<redacted>" and found.config["beta"] == 0.1
    assert [row["train/global_step"] for row in found.history] == [0, 10]
    assert found.history[0]["loss"] == 0.69 and found.history[0]["probe/kl_forward_rb_nats"] == 0.0
    assert found.run.notes == "# a run\n\nend"
    assert found.summary["final/probe/margin_nats"] == 4.5  # plain, not {"last": ...}: scatter plots need that
    assert found.exit_code == 0
    assert any(metric.glob_name == "*" and metric.step_metric == tracking.STEP for metric in found.metrics)
    assert b"swordfish" not in files_under(tmp_path) and CANARY.encode() not in files_under(tmp_path)


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.finish(1)
    tracker.finish(0)
    assert read_offline(log_files(tmp_path)[0]).exit_code == 1


def test_a_table_and_a_picture_are_recorded(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "report.png")
    tracker = start(tmp_path)
    tracker.table("samples", ["prompt", "reply"], [["hello", f"my token is {CANARY}"], ["bye", None]])
    tracker.image("report", tmp_path / "report.png")
    tracker.finish()
    table, picture = read_offline(log_files(tmp_path)[0]).history
    assert (table["samples._type"], table["samples.nrows"]) == ("table-file", 2)
    assert picture["report._type"] == "image-file"
    assert b"hello" in files_under(tmp_path) and CANARY.encode() not in files_under(tmp_path)


def test_two_jobs_in_one_process_are_two_runs_and_both_finish(tmp_path: Path) -> None:
    first, second = tmp_path / "beta=0.1", tmp_path / "beta=0.2"
    for folder, beta in [(first, 0.1), (second, 0.2)]:
        tracker = start(folder, config={"beta": beta}, group="sweep")
        tracker.log({"loss": beta}, 1)
        tracker.finish()
    for folder, beta in [(first, 0.1), (second, 0.2)]:
        (path,) = log_files(folder)
        found = read_offline(path)
        assert [row["loss"] for row in found.history] == [beta]
        assert (found.config["beta"], found.exit_code) == (beta, 0)


def test_a_run_of_the_users_own_stays_open_and_untouched(tmp_path: Path) -> None:
    import wandb

    own = wandb.init(mode="offline", dir=str(tmp_path))
    tracker = start(tmp_path / "ours")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert wandb.run is own
    own.log({"mine": 1})
    own.finish()
    assert [row["mine"] for row in read_offline(log_files(tmp_path)[0]).history] == [1]


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.log({"loss": 2.0}, 1)
    first.finish(1)
    time.sleep(1.1)  # wandb names its folders by the second
    second = start(tmp_path, run_id=first.run_id)
    second.log({"loss": 1.0}, 2)
    second.finish()
    assert [read_offline(path).run.run_id for path in log_files(tmp_path)] == [first.run_id] * 2
    assert first.hint == second.hint


def test_no_key_on_a_terminal_goes_offline_in_seconds_without_a_question_and_keeps_the_command_line(
    tmp_path: Path,
) -> None:
    code = (
        "import logging, sys; logging.basicConfig(level='INFO'); from dpo_kit.run import tracking\n"
        "t = tracking.start({'beta': 1}, run_dir=sys.argv[1], project='p', name='n')\n"
        "t.log({'loss': 1.0}, 1); t.finish(); print('MODE', t.mode)"
    )
    ours, theirs = pty.openpty()
    began = time.monotonic()
    argv = [sys.executable, "-c", code, str(tmp_path), f"hub.token={CANARY}"]
    env = os.environ | {"OPENAI_API_KEY": CANARY}
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    assert process.wait(60) == 0
    seconds = time.monotonic() - began
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "MODE offline" in shown and seconds < 10
    assert "no API key" in shown and "wandb login && wandb sync" in shown
    assert len(shown.strip().splitlines()) == 2, shown  # our line, and MODE
    assert CANARY.encode() not in files_under(tmp_path)


@pytest.mark.parametrize("server", ["closed port", "silent", "errors", "refuses the key"])
def test_an_unreachable_server_costs_under_ten_seconds_and_one_line_says_how_to_sync(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if server != "closed port":
        monkeypatch.setattr(tracking, "INIT_SECONDS", 1.0)  # the real figure is timed once, above
    caplog.set_level(logging.INFO, "dpo_kit")
    with socket.create_server(("127.0.0.1", 0)) as hole, FakeWandb(401 if "key" in server else 500) as faulty:
        port = {"closed port": 9, "silent": hole.getsockname()[1]}.get(server, faulty.server_port)
        use_server(monkeypatch, f"http://127.0.0.1:{port}")
        began = time.monotonic()
        tracker = start(tmp_path)
        tracker.log({"loss": 1.0}, 1)
        tracker.finish()
        assert time.monotonic() - began < 10
    assert tracker.mode == "offline"
    (line,) = said(caplog)
    assert f"wandb sync {tmp_path}" in line and "\n" not in line and KEY not in line
    (path,) = log_files(tmp_path)
    assert [row["loss"] for row in read_offline(path).history] == [1.0]


def test_a_malformed_key_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = start(tmp_path)
    tracker.finish()
    assert tracker.mode == "offline"


def test_online_the_server_gets_every_row_and_a_clean_exit_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo-kit", f"hub.token={CANARY}"])
    with FakeWandb() as server:
        use_server(monkeypatch, server.url)
        tracker = start(tmp_path, config={"beta": 0.1, "hub_token": "swordfish"}, group="sweep-1", tags=["dpo"])
        for step in range(3):
            tracker.log({"loss": step / 2}, step)
        tracker.finish()
    assert (tracker.mode, tracker.hint) == ("online", "")
    assert [row["loss"] for row in server.history] == [0, 0.5, 1]
    assert (server.runs[0]["groupName"], server.runs[0]["tags"], server.exit_code) == ("sweep-1", ["dpo"], 0)
    sent = "".join(server.bodies)
    assert "swordfish" not in sent and CANARY not in sent


def test_a_server_lost_midway_blocks_neither_rows_nor_tables_and_the_end_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2.0)
    monkeypatch.setattr(tracking, "TABLE_SECONDS", 1.0)
    with FakeWandb() as server:
        use_server(monkeypatch, server.url)
        tracker = start(tmp_path)
    began = time.monotonic()
    tracker.log({"loss": 1.0}, 1)
    tracker.table("samples", ["reply"], [["hello"]])
    tracker.summary({"final/x": 1.0})
    assert time.monotonic() - began < 1
    tracker.finish()
    assert time.monotonic() - began < 6
    (line,) = said(caplog)
    assert "TimeoutError" in line and f"wandb sync {tmp_path}" in line


def test_the_line_that_says_how_to_sync_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start(tmp_path / "a run")  # the blank must be quoted
    tracker.log({"loss": 1.5}, 3)
    tracker.finish()
    command = tracker.hint.partition("wandb login && ")[2]
    with FakeWandb() as server:
        use_server(monkeypatch, server.url)
        wandb = f"{shlex.quote(sys.executable)} -m wandb"
        subprocess.run(command.replace("wandb sync", f"{wandb} sync"), shell=True, check=True, timeout=60, cwd=tmp_path)
    assert [(row["loss"], row[tracking.STEP]) for row in server.history] == [(1.5, 3)]
    assert server.runs[0]["name"] == tracker.run_id


def test_what_wandb_raises_midway_is_said_once_and_swallowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("wandb broke")

    run = SimpleNamespace(
        log=fail, summary=SimpleNamespace(update=fail), finish=fail, settings=SimpleNamespace(sync_dir="x")
    )
    tracker = tracking.Tracker(run, run_id="a", mode="offline", hint="wandb sync x")
    tracker.log({"loss": 1.0}, 1)
    tracker.summary({"a": 1})
    tracker.table("t", ["a"], [[1]])
    tracker.image("i", tmp_path / "missing.png")
    tracker.finish()
    (line,) = said(caplog)
    assert "wandb broke" in line and "metrics.jsonl" in line


def test_the_death_of_wandbs_own_process_ends_neither_this_job_nor_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import psutil

    tracker = start(tmp_path / "1")
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb"):
            child.kill()
            child.wait(10)
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.finish()
    assert len(said(caplog)) == 1
    following = start(tmp_path / "2")
    following.finish()
    assert read_offline(log_files(tmp_path / "2")[0]).exit_code == 0


def test_disabled_and_not_installed_are_silent_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = start(tmp_path / "disabled")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.mode == "disabled" and files_under(tmp_path / "disabled") == b""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert start(tmp_path).mode == "disabled"
    monkeypatch.undo()


def test_wandb_mode_offline_is_obeyed_with_a_key_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeWandb() as server:
        use_server(monkeypatch, server.url)
        monkeypatch.setenv("WANDB_MODE", "offline")
        tracker = start(tmp_path)
        tracker.finish()
    assert tracker.mode == "offline" and server.bodies == []


VARIABLES = {"PROJECT": "mine", "NAME": "n1", "TAGS": "a, b", "RUN_ID": "fixed"}
VARIABLES |= {"JOB_TYPE": "tune", "ENTITY": "me", "RUN_GROUP": "g"}


def tracked(folder: Path, words: list[str]) -> Any:
    """The record of the wandb run that training with `words` would open."""
    settings = check(compose(words))
    tracker = start_tracking(settings, {}, RunDirectory(folder))
    tracker.finish()
    (file,) = log_files(folder)
    return read_offline(file).run


def test_wandb_s_own_variables_are_obeyed_and_typed_keys_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, value in VARIABLES.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = tracked(tmp_path / "1", [])
    assert (run.project, run.display_name, list(run.tags), run.run_id) == ("mine", "n1", ["a", "b"], "fixed")
    assert (run.job_type, run.entity, run.run_group) == ("tune", "me", "g")
    typed = ["tracking.project=p", "tracking.name=n", "tracking.tags=[c]", "tracking.group=h", "tracking.entity=we"]
    run = tracked(tmp_path / "2", typed)
    assert (run.project, run.display_name, list(run.tags), run.run_group, run.entity) == ("p", "n", ["c"], "h", "we")


def test_in_a_sweep_the_name_and_id_of_the_environment_are_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (VARIABLES | {"MODE": "offline"}).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(
        HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.MULTIRUN, sweep=SimpleNamespace(dir="."))
    )
    run = tracked(tmp_path / "dpo-beta0.1", [])
    assert run.display_name == "n1-dpo-beta0.1" and run.run_id != "fixed"


@pytest.mark.parametrize("value", ["true", "1", "YES"])
def test_wandb_disabled_is_obeyed(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert start(tmp_path).mode == "disabled" and files_under(tmp_path) == b""
