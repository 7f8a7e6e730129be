"""Ctrl-C and SIGTERM while a trainer runs: the first one lets it save, a second Ctrl-C stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INSIST_SECONDS = 1.0
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(BaseException):
    """Leaves the trainer once what it has done is saved, or where there is nothing to save."""


class StopRequest:
    """Whether, and by which signal, the trainer was asked to stop.

    `may_leave`: nothing is lost if the present work (an evaluation, the start, the end) is left at once; else the
    trainer asks at its next step. `step` is the one that would be saved, None where there is nothing to save.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.may_leave = True
        self.step: int | None = None
        self.left = threading.Event()
        self._insisting = False
        self._owner = os.getpid()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if os.getpid() != self._owner:  # a worker that loads data for us
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif self.signal is None:
            self.signal = signal.Signals(number)
            does = "stopping" if self.step is None else f"saving at step {self.step}"
            again = " again" if number == signal.SIGINT else ""
            _say(f"{NAMES[self.signal]}: {does}; Ctrl-C{again} stops at once")
            if self.may_leave:
                threading.Thread(target=self._insist, daemon=True).start()
                raise Interrupted
        elif self._insisting:
            self._insisting = False
            if self.may_leave:
                raise Interrupted
        elif number == signal.SIGINT:
            _say("stopping at once; the last complete checkpoint stays as it is")
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def leaving_allowed(self) -> Iterator[None]:
        """What runs inside may be left at any moment. Raises Interrupted at once where a stop was asked for before."""
        if self.signal is not None:
            raise Interrupted
        self.may_leave = True
        try:
            yield
        finally:
            self.may_leave = False

    def exception(self) -> BaseException:
        """What tells the caller of the run how it was stopped: as if nobody had caught the signal."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

    def _insist(self) -> None:
        """Send the signal again until the trainer was left: an exception that a handler raises is lost where it lands
        in a callback of the interpreter, as those of torch.compile (huggingface/transformers#34656).
        """
        while not self.left.wait(INSIST_SECONDS):
            if self.may_leave and self.signal is not None:
                self._insisting = True
                signal.pthread_kill(threading.main_thread().ident or 0, self.signal)


@contextlib.contextmanager
def catch_signals(request: StopRequest) -> Iterator[None]:
    """`request` receives SIGINT and SIGTERM inside the block; in another than the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in NAMES if signal.getsignal(number) != signal.SIG_IGN]  # as nohup asks for
    before = {number: signal.signal(number, request.receive) for number in heeded}
    try:
        yield
    finally:
        request.left.set()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _say(text: str) -> None:
    """To the terminal, past Python's streams: one of them may have been at work when the signal came."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\ndpo_kit: {text}\n".encode())
