"""Starting and ending the process of a job: forked from a warm server without GPU, a fresh interpreter with one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

from dpo_kit.sweep.launch.job import run_file

PRELOAD = ["dpo_kit.sweep.launch.warm"]


class Process(Protocol):
    """A started job."""

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its process group."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""


class Starter(Protocol):
    """A way of starting jobs."""

    def __call__(self, file: Path, log: Path, environment: Mapping[str, str]) -> Process:
        """Run the job of `file`, its output going to `log`."""


def choose_starter(devices: Sequence[str], command: Sequence[str]) -> Starter:
    """Fork where that is safe: a process that has initialised CUDA must not be forked, nor one of macOS."""
    if devices or command or not sys.platform.startswith("linux"):
        return FreshStarter(command)
    return ForkStarter()


class FreshStarter:
    """A new interpreter per job; `command` stands in the place of `python`, such as torchrun or accelerate launch."""

    def __init__(self, command: Sequence[str] = ()) -> None:
        self.command = [find_program(command[0]), *command[1:]] if command else [sys.executable]

    def __call__(self, file: Path, log: Path, environment: Mapping[str, str]) -> Process:
        words = [*self.command, "-m", "dpo_kit.sweep.launch.job", str(file)]
        with log.open("ab") as output:
            return subprocess.Popen(
                words,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def find_program(name: str) -> str:
    """`name` on the path, else beside this interpreter (an environment that was not activated)."""
    beside = Path(sys.executable).with_name(name)
    return shutil.which(name) or (str(beside) if beside.exists() else name)


class ForkStarter:
    """A fork of a server that has imported all that a run needs: the second job starts at once."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def __call__(self, file: Path, log: Path, environment: Mapping[str, str]) -> Process:
        process = self.context.Process(target=run_forked, args=(file, log, dict(environment)), daemon=False)
        process.start()
        return Forked(process)


class Forked:
    """A job forked from the warm server."""

    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process
        self.pid = int(process.pid or 0)

    def poll(self) -> int | None:
        return self.process.exitcode


def run_forked(file: Path, log: Path, environment: Mapping[str, str]) -> None:
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
