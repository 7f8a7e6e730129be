"""wandb as a sink that cannot hurt a run; the only file that imports wandb, and only in a process that trains.

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
from typing import Any, Literal

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
    """One wandb run, or nothing at all behind the same methods; no method raises what wandb raises. run_id: to resume
    by. mode: "online", "offline" or "disabled". hint: the line that says how to upload what is only on disk, or "".
    """

    def __init__(self, run: Any = None, *, run_id: str = "", mode: str = "disabled", hint: str = "") -> None:
        self.run_id, self.mode, self.hint = run_id, mode, hint
        self._run = run
        self._files = str(run.settings.sync_dir) if run is not None else ""
        self._failed = False
        self._table_thread: threading.Thread | None = None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send one row of numbers, drawn against `train/global_step` = `step`; other values are left out."""
        values = {key: plain(value) for key, value in metrics.items()}
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._guard(lambda run, _: run.log(numbers | {STEP: step}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final scalars, each under its plain key (so that tables and scatter plots find it)."""
        self._guard(lambda run, _: run.summary.update({key: _cell(value) for key, value in values.items()}))

    def notes(self, text: str) -> None:
        """Set the page of notes that the run's overview shows; links to files of the run directory are no use there."""
        self._guard(lambda run, _: setattr(run, "notes", re.sub(r"!\[.*?\]\(.*?\)\n*", "", text)))

    def image(self, key: str, path: str | Path) -> None:
        """Send the picture at `path`."""
        self._guard(lambda run, wandb: run.log({key: wandb.Image(str(path))}))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table, such as sample generations; `rows` hold one value per column. wandb asks its server first (19 s
        when the network is lost): this waits in a thread; a table that comes while the last one waits is dropped.
        """
        data = [[_cell(value) for value in row] for row in rows]

        def send(run: Any, wandb: Any) -> None:
            run.log({key: wandb.Table(columns=list(columns), data=data)})

        if self.mode != "online":
            self._guard(send)
        elif self._table_thread is None or not self._table_thread.is_alive():
            self._table_thread = threading.Thread(target=self._guard, args=(send,), daemon=True)
            self._table_thread.start()

    def finish(self, exit_code: int = 0) -> None:
        """End the wandb run; a second call does nothing."""
        if self._table_thread is not None:
            self._table_thread.join(TABLE_SECONDS)
        self._guard(lambda run, _: run.finish(exit_code=exit_code))
        self._run = None

    def _guard(self, act: Callable[[Any, Any], Any]) -> None:
        """`act` on the run and the module; what fails is said once, with how to upload what lies on disk."""
        if self._run is None:
            return
        try:
            import wandb

            act(self._run, wandb)
        except Exception as error:
            if self.mode == "online":
                self.hint = f"to upload what wandb missed: wandb sync {shlex.quote(self._files)}"
            if not self._failed:
                log.warning("wandb failed (%s); metrics.jsonl stays complete. %s", _short(error), self.hint)
            self._failed = True
            if isinstance(error, ConnectionError):  # wandb's own process is gone, and this run with it
                self._run = None
                _end_service()


def start(
    config: Mapping[str, Any], *, run_dir: str | Path, project: str, name: str, entity: str | None = None,
    group: str | None = None, tags: Sequence[str] = (), job_type: str = "train", run_id: str | None = None,
) -> Tracker:  # fmt: skip
    """Open one wandb run for one job; see the promises above. `WANDB_MODE`, `WANDB_DISABLED` and `WANDB_JOB_TYPE` are
    obeyed; `config` is redacted; the files go to `run_dir`/wandb; the run `run_id` is resumed or begun (None: new).
    """
    run_id = run_id or uuid.uuid4().hex[:8]
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {
            "project": project, "entity": entity, "group": group, "id": run_id, "dir": str(run_dir),
            "name": redact_text(name), "tags": [redact_text(tag) for tag in tags],
            "job_type": os.environ.get("WANDB_JOB_TYPE", job_type) if job_type == "train" else job_type,
            "config": redact(dict(config)),
        }  # fmt: skip
        if os.environ.get("WANDB_DISABLED", "").upper() in TRUE:
            return Tracker(run_id=run_id)
        import wandb

        settings, known = _setup().settings, False
        asked = os.environ.get("WANDB_MODE") or settings.mode
        mode = _MODES.get(asked, asked)
        reason = f"mode {mode} asked for"
        if mode == "disabled":
            return Tracker(run_id=run_id)
        if mode == "online":
            try:
                reason, known = "no API key", wandb.run is not None or wandb.login(prompt=False, verify=False)
            except wandb.errors.Error as error:
                reason = _short(error)
        if known:
            try:
                return Tracker(_open("online", arguments), run_id=run_id, mode="online")
            except Exception as error:
                reason = f"going online failed with {_short(error)}"
                _end_service()  # else the run id counts as in use
                _setup()
        folder = shlex.quote(str(Path(run_dir).resolve() / "wandb"))
        login = "wandb login && " if "API key" in reason else ""
        hint = f"wandb is offline ({reason}); to upload: {login}wandb sync {folder}/offline-run-*-{run_id}"
        tracker = Tracker(_open("offline", arguments), run_id=run_id, mode="offline", hint=hint)
        log.info(hint)
        return tracker
    except Exception as error:
        log.warning("wandb cannot be used (%s); this run is recorded in metrics.jsonl alone", _short(error))
        return Tracker(run_id=run_id)


def _setup() -> Any:
    """wandb's process-wide part, silent: every message is ours, in the log. Its error reports to third parties are off
    unless asked for: they hold 10 s at exit when the network hangs.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb.setup(settings=wandb.Settings(silent=True, x_service_wait=SERVICE_SECONDS))


def _end_service() -> None:
    """Stop wandb's helper process, unless a run of the user's lives there; the next run starts a fresh one."""
    import wandb

    if wandb.run is None:
        with contextlib.suppress(Exception):
            wandb.teardown()


def _open(mode: Literal["online", "offline"], arguments: dict[str, Any]) -> Any:
    """A wandb run of its own: the user's and earlier runs of this process stay untouched (`create_new`)."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True,  # the command line
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
    )  # fmt: skip
    run = wandb.init(mode=mode, resume="allow", reinit="create_new", settings=settings, **arguments)
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


def _cell(value: Any) -> Any:
    value = plain(value)
    return redact_text(value) if isinstance(value, str) else value


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return redact_text(f"{type(error).__name__}: {text[:100]}")
