"""wandb as a sink that cannot hurt a run; the only file that imports wandb.

Three promises. It never asks: without a key the run is offline. It never blocks: an unreachable server costs at most
`INIT_SECONDS`, a lost one `TABLE_SECONDS + FINISH_SECONDS` at the end. It never ends a run: whatever wandb raises is
logged once and swallowed, since metrics.jsonl is the complete record.

Nothing secret leaves: the config is redacted (dpo_kit.run.redact), the command line and the console are not recorded.
"""

import contextlib
import logging
import os
import re
import shlex
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_kit.run.history import plain
from dpo_kit.run.redact import redact, redact_text

log = logging.getLogger(__name__)

SERVICE_SECONDS = 8.0  # for wandb's own helper process; it takes half a second on an idle machine
INIT_SECONDS = 4.0  # a healthy server answers wandb.init in about one; then offline, to be synced later
TABLE_SECONDS = 3.0  # at the end, for the last table on its way
FINISH_SECONDS = 6.0  # what is not uploaded by then lies on disk, complete, for `wandb sync`
STEP = "train/global_step"
TRUE = ("1", "ON", "YES", "TRUE")  # as transformers reads WANDB_DISABLED
_MODES = {"dryrun": "offline", "run": "online", "shared": "online"}


class Tracker:
    """One wandb run, or nothing at all behind the same methods; no method raises what wandb raises.

    run_id: the id to resume by. mode: "online", "offline" or "disabled". hint: the one line that says how to upload
    what is only on disk; empty where there is nothing to upload.
    """

    def __init__(self, run: Any = None, *, run_id: str = "", mode: str = "disabled", hint: str = "") -> None:
        self.run_id, self.mode, self.hint = run_id, mode, hint
        self._run = run
        self._files = str(run.settings.sync_dir) if run is not None else ""
        self._failed = False
        self._table_thread: threading.Thread | None = None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send one row of numbers, drawn against `train/global_step` = `step`; other values are left out."""

        def send(run: Any) -> None:
            values = {key: plain(value) for key, value in metrics.items()}
            run.log({key: value for key, value in values.items() if isinstance(value, int | float)} | {STEP: step})

        self._guard(send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final scalars, each under its plain key (so that tables and scatter plots find it)."""
        self._guard(lambda run: run.summary.update({key: _cell(value) for key, value in values.items()}))

    def notes(self, text: str) -> None:
        """Set the page of notes that the run's overview shows; links to files of the run directory are no use there."""
        self._guard(lambda run: setattr(run, "notes", re.sub(r"!\[.*?\]\(.*?\)\n*", "", text)))

    def image(self, key: str, path: str | Path, step: int | None = None) -> None:
        """Send the picture at `path`."""
        self._guard(lambda run: run.log({key: _wandb().Image(str(path))} | _at(step)))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None = None) -> None:
        """Send a table, such as sample generations; `rows` hold one value per column.

        wandb asks its server first (19 s each time when the network is lost), so this waits in a thread of its own;
        a table that comes while the last one still waits is dropped.
        """
        data = [[_cell(value) for value in row] for row in rows]

        def send(run: Any) -> None:
            run.log({key: _wandb().Table(columns=list(columns), data=data)} | _at(step))

        if self.mode != "online":
            self._guard(send)
        elif self._table_thread is None or not self._table_thread.is_alive():
            self._table_thread = threading.Thread(target=self._guard, args=(send,), daemon=True)
            self._table_thread.start()

    def finish(self, exit_code: int = 0) -> None:
        """End the wandb run; a second call does nothing."""
        if self._table_thread is not None:
            self._table_thread.join(TABLE_SECONDS)
        self._guard(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _guard(self, act: Callable[[Any], Any]) -> None:
        try:
            if self._run is not None:
                act(self._run)
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        """Say once that wandb failed, and how to upload what lies on disk; training and metrics.jsonl go on."""
        if self.mode == "online":
            self.hint = f"to upload what wandb missed: wandb sync {shlex.quote(self._files)}"
        if not self._failed:
            log.warning("wandb failed (%s); metrics.jsonl stays complete. %s", _short(error), self.hint)
        self._failed = True
        if isinstance(error, ConnectionError):  # wandb's own process is gone, and this run with it
            self._run = None
            _end_service()


def start(
    config: Mapping[str, Any],
    *,
    run_dir: str | Path,
    project: str,
    name: str,
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    job_type: str = "train",
    run_id: str | None = None,
) -> Tracker:
    """Open one wandb run for one job; see the promises above. `WANDB_MODE` (online, offline, disabled),
    `WANDB_DISABLED` and `WANDB_JOB_TYPE` are obeyed.

    `config` is redacted; wandb's files go to `run_dir`/wandb; the run `run_id` is resumed or begun (None: a new one).
    """
    run_id = run_id or uuid.uuid4().hex[:8]
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {
            "id": run_id,
            "dir": str(run_dir),
            "project": project,
            "entity": entity,
            "group": group,
            "job_type": os.environ.get("WANDB_JOB_TYPE", job_type) if job_type == "train" else job_type,
            "name": redact_text(name),
            "tags": [redact_text(tag) for tag in tags],
            "config": redact(dict(config)),
        }
        if os.environ.get("WANDB_DISABLED", "").upper() in TRUE:
            return Tracker(run_id=run_id)
        wandb, settings = _wandb(), _setup().settings
        asked = os.environ.get("WANDB_MODE") or settings.mode
        mode = _MODES.get(asked, asked)
        reason = f"mode {mode} asked for"
        if mode == "online":  # where there is a key
            try:
                known = wandb.run is not None or wandb.login(prompt=False, verify=False)
                mode, reason = ("online", "") if known else ("offline", "no API key")
            except wandb.errors.Error as error:
                mode, reason = "offline", _short(error)
        if mode == "disabled":
            return Tracker(run_id=run_id)
        if mode == "online":
            try:
                return Tracker(_open("online", arguments), run_id=run_id, mode="online")
            except Exception as error:
                reason = f"going online failed with {_short(error)}"
                _end_service()  # else the run id counts as in use
                _setup()
        tracker = Tracker(_open("offline", arguments), run_id=run_id, mode="offline")
        folder = shlex.quote(str(Path(run_dir).resolve() / "wandb"))
        login = "wandb login && " if "API key" in reason else ""
        tracker.hint = f"wandb is offline ({reason}); to upload: {login}wandb sync {folder}/offline-run-*-{run_id}"
        log.info(tracker.hint)
        return tracker
    except Exception as error:
        log.warning("wandb cannot be used (%s); this run is recorded in metrics.jsonl alone", _short(error))
        return Tracker(run_id=run_id)


def _setup() -> Any:
    """wandb's process-wide part, silent: every message is ours, in the log.

    Its error reports to third parties are off unless asked for: they hold 10 s at exit when the network hangs.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb = _wandb()
    return wandb.setup(settings=wandb.Settings(silent=True, x_service_wait=SERVICE_SECONDS))


def _end_service() -> None:
    """Stop wandb's helper process, unless a run of the user's lives there; the next run starts a fresh one."""
    wandb = _wandb()
    if wandb.run is None:
        with contextlib.suppress(Exception):
            wandb.teardown()


def _open(mode: str, arguments: dict[str, Any]) -> Any:
    """A wandb run of its own: the user's and earlier runs of this process stay untouched (`create_new`)."""
    wandb = _wandb()
    settings = wandb.Settings(
        silent=True,
        console="off",
        x_disable_meta=True,  # holds the command line
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    run = wandb.init(mode=mode, resume="allow", reinit="create_new", settings=settings, **arguments)
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


def _wandb() -> Any:
    import wandb  # half a second, and only in a process that trains

    return wandb


def _at(step: int | None) -> dict[str, int]:
    return {} if step is None else {STEP: step}


def _cell(value: Any) -> Any:
    value = plain(value)
    return redact_text(value) if isinstance(value, str) else value


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return redact_text(f"{type(error).__name__}: {text[:100]}")
