"""Starting and ending the process of a job: forked from a warm server without GPU, a fresh interpreter with one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from dpo_kit.sweep.launch.job import run_file

PRELOAD = ["dpo_kit.sweep.launch.warm"]


class Forked:
    """A job forked from the warm server, with what we use of `subprocess.Popen`."""

    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process
        self.pid = int(process.pid or 0)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode


Process = subprocess.Popen[bytes] | Forked  # the leader of its own process group
Starter = Callable[[Path, Path, Mapping[str, str]], Process]  # of a job file, its log, what its environment has more


def choose_starter(devices: Sequence[str], command: Sequence[str]) -> Starter:
    """Fork where that is safe: a process that has initialised CUDA must not be forked, nor one of macOS."""
    if devices or command or not sys.platform.startswith("linux"):
        return partial(start_fresh, command=command)
    return start_forked


def start_fresh(file: Path, log: Path, environment: Mapping[str, str], command: Sequence[str] = ()) -> Process:
    """A new interpreter; `command` stands in the place of `python`, such as torchrun or accelerate launch."""
    words = list(command) or [sys.executable]
    if shutil.which(words[0]) is None:  # an environment that was not activated has its programs beside its interpreter
        beside = Path(sys.executable).with_name(words[0])
        words[0] = str(beside) if beside.exists() else words[0]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*words, "-m", "dpo_kit.sweep.launch.job", str(file)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_forked(file: Path, log: Path, environment: Mapping[str, str]) -> Process:
    """A fork of a server that has imported all that a run needs: the second job starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run_forked, args=(file, log, dict(environment)), daemon=False)
    process.start()
    return Forked(process)


def _run_forked(file: Path, log: Path, environment: Mapping[str, str]) -> None:
    """What a fork does: its own group, its output to `log`, then the job."""
    os.setsid()
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment)
    sys.exit(run_file(file))


def send(process: Process, number: signal.Signals) -> None:
    """A signal to a job and to all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it has not made its own group yet
            if process.poll() is None:
                os.kill(process.pid, number)
