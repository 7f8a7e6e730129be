"""One writer per directory: a second start is refused, the lock of a writer that died is recovered.

The system's own lock decides where the file system has it, else filelock's marker file. `.lock` says in two lines
(process, host) who holds it: a refusal names the holder, and one on another host counts where locks do not cross hosts.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, SoftFileLock, Timeout

from dpo_kit.errors import ConfigError

FILE = ".lock"
SLACK_SECONDS = 2.0  # the system knows to a second when a process began
log = logging.getLogger(__name__)


class Holder(NamedTuple):
    """Who wrote a lock; `since`: when, in seconds since 1970."""

    pid: int
    host: str
    since: float


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`. ConfigError where another process writes there, or may still do so."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.absolute() / FILE
    with contextlib.ExitStack() as stack:
        try:
            try:
                stack.enter_context(FileLock(path, timeout=0, fallback_to_soft=False))
            except Timeout:
                raise
            except OSError:  # a file system without locks
                stack.enter_context(SoftFileLock(f"{path}.marker", timeout=0))
        except Timeout as error:
            raise ConfigError(_in_use(directory)) from error
        if holder := read_holder(directory):
            if is_alive(holder):  # on a file system whose locks do nothing, or do not cross hosts
                raise ConfigError(_in_use(directory))
            log.info("process %s ended without giving %s back; going on", holder.pid, directory)
        path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        stack.callback(path.write_text, "")  # before the lock is released
        yield


def refuse_held(directory: Path) -> None:
    """ConfigError where another process writes `directory`; nothing is locked or written."""
    if (holder := read_holder(directory)) and holder.host == socket.gethostname() and is_alive(holder):
        raise ConfigError(_in_use(directory))


def read_holder(directory: Path) -> Holder | None:
    """Who holds the lock of `directory`, or held it when it died; None where it was given back."""
    path = directory / FILE
    try:
        pid, host = path.read_text(encoding="utf-8").splitlines()
        return Holder(int(pid), host, path.stat().st_mtime)
    except (OSError, ValueError):
        return None


def is_alive(holder: Holder) -> bool:
    """Whether `holder` still runs; True where it cannot be known, on another host."""
    import psutil

    if holder.host != socket.gethostname():
        return True
    try:
        process = psutil.Process(holder.pid)
        younger = process.create_time() > holder.since + SLACK_SECONDS  # another process was given its number
        return process.status() != psutil.STATUS_ZOMBIE and not younger
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def _in_use(directory: Path) -> str:
    holder = read_holder(directory)
    if holder and holder.host != socket.gethostname():
        return (
            f"{directory} was last written by process {holder.pid} on {holder.host}, which did not give its lock back "
            f"and cannot be asked from here: if it no longer runs, delete {directory / FILE}"
        )
    since = holder and time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    who = f"process {holder.pid} on {holder.host} (since {since})" if holder else "another process"
    return f"{directory} is being written by {who}: wait for it, end it, or name another directory"
