"""One writer per directory: a second start is refused, the lock of a writer that died is recovered.

The system's own lock (flock) decides where the file system has it, else filelock's marker file. `.lock` says who holds
it, so that a refusal names the holder, and one on another host is not overlooked where locks do not cross hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import SoftFileLock, Timeout

from dpo_kit.errors import ConfigError

FILE = ".lock"
POLL_SECONDS = 0.1
log = logging.getLogger(__name__)
Holder = dict[str, Any]


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`. ConfigError where another process writes there, or may still do so."""
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((directory / FILE).open("a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(_in_use(directory)) from error
        except OSError:  # a file system without locks
            stack.enter_context(_marker(directory))
        _recover(directory)
        _say(file, this_process())
        try:
            yield
        finally:
            _say(file, None)


def refuse_held(directory: Path) -> None:
    """ConfigError where another process writes `directory`; nothing is locked or written."""
    if (holder := read_holder(directory)) and holder["host"] == socket.gethostname() and is_alive(holder):
        raise ConfigError(_in_use(directory))


def wait_for_writer(directory: Path, seconds: float) -> None:
    """Let a writer of `directory` that is about to end do so, as a job whose sweep was killed; at most `seconds`."""
    until, said = time.monotonic() + seconds, False
    while time.monotonic() < until and (holder := read_holder(directory)) and is_alive(holder):
        if not said:
            log.info("waiting for process %s, which still writes %s", holder["pid"], directory)
        said = True
        time.sleep(POLL_SECONDS)


def read_holder(directory: Path) -> Holder | None:
    """Who holds the lock of `directory`, or held it when it died; None where it was given back."""
    try:
        holder = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else None


def this_process() -> Holder:
    """What tells this process from any other, also after a reboot or on another machine."""
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": pid, "boot": _boot(), "started": _started(pid), "since": since}


def is_alive(holder: Holder) -> bool:
    """Whether `holder` still runs; True where it cannot be known, on another host."""
    if holder["host"] != socket.gethostname():
        return True
    return holder.get("boot") == _boot() and holder.get("started") == _started(holder["pid"]) is not None


def _recover(directory: Path) -> None:
    """Take over from a holder that died. ConfigError where it cannot be known or did not."""
    holder = read_holder(directory)
    if holder is None:
        return
    if holder["host"] != socket.gethostname():
        raise ConfigError(
            f"{directory} was last written by process {holder['pid']} on {holder['host']}, which did not give its lock "
            f"back and cannot be asked from here: if it no longer runs, delete {directory / FILE}"
        )
    if is_alive(holder):  # on a file system whose locks do nothing
        raise ConfigError(_in_use(directory))
    log.info("process %s ended without giving %s back; going on", holder["pid"], directory)


@contextlib.contextmanager
def _marker(directory: Path) -> Iterator[None]:
    lock = SoftFileLock(directory / f"{FILE}.marker")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(_in_use(directory)) from error
    try:
        yield
    finally:
        lock.release()


def _in_use(directory: Path) -> str:
    holder, who = read_holder(directory), "another process"
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']} (since {holder.get('since')})"
    return f"{directory} is being written by {who}: wait for it, end it, or choose another hydra.run.dir"


def _say(file: IO[str], holder: Holder | None) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(holder) if holder else "")
    file.flush()


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's own count, or None where it runs no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return _alive_elsewhere(pid)
    return None if fields[0] == "Z" else fields[19]


def _alive_elsewhere(pid: int) -> str | None:
    """The same where there is no /proc: only whether it runs."""
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "running"
    return "running"
