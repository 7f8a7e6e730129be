"""Faults tried on the product from outside: the command line in a forked process, with a deed at a named point.

    done = run_cli(words, folder, fault="save:after=optimizer#2:kill")

A fault reads `<point>#<n>:<deed>`: at the n-th time that the point is passed (1 unless said), do the deed. The process
is forked from a server that has imported everything, so that each try takes as long as its training.
"""

import contextlib
import errno
import importlib
import itertools
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass

import pytest

POINTS = {  # name: (what is called there, before or after the call)
    "start:load": ("dpo_kit.trainer.build.load_policy", "before"),
    "ref_cache:write": ("dpo_kit.trainer.reference_store.Store.write", "before"),
    "ref_cache:written": ("dpo_kit.trainer.reference_store.Store.write", "after"),
    "measure:start": ("dpo_kit.callbacks.probe.PairProbe._score_now", "before"),
    "eval": ("dpo_kit.trainer.measuring.ProbeAlone.evaluate", "before"),
    "eval:probe": ("dpo_kit.callbacks.probe.PairProbe._score_now", "after"),
    "eval:drift": ("dpo_kit.callbacks.drift.Drift.forward", "before"),
    "step": ("transformers.Trainer._get_grad_norm", "before"),
    "step:loss": ("transformers.Trainer.training_step", "after"),  # its gradient is finite already
    "step:backward": ("trl.DPOTrainer.compute_loss", "after"),
    "step:gradient": ("transformers.Trainer._clip_grad_norm", "before"),
    "save:before": ("dpo_kit.trainer.resume.safe_trainer.Safekeeping._save_checkpoint", "before"),
    "save:after=model": ("transformers.Trainer._save", "after"),
    "save:after=optimizer": ("transformers.Trainer._save_optimizer_and_scheduler", "after"),
    "save:optimizer": ("transformers.Trainer._save_optimizer_and_scheduler", "before"),
    "save:after=rng": ("transformers.Trainer._save_rng_state", "after"),
    "save:after=state": ("transformers.trainer_callback.TrainerState.save_to_json", "after"),
    "save:after=record": ("dpo_kit.trainer.resume.safe_trainer.Safekeeping._save_own", "after"),
    "save:hash": ("dpo_kit.trainer.resume.whole_or_absent._describe_and_sync", "before"),
    "save:manifest": ("dpo_kit.trainer.resume.whole_or_absent.digest_of", "before"),
    "save:rename": ("dpo_kit.trainer.resume.whole_or_absent.sync_folder", "before"),
    "save:rotate": ("dpo_kit.trainer.resume.whole_or_absent.rotate", "before"),
    "save:removing": ("dpo_kit.trainer.resume.whole_or_absent.shutil.rmtree", "before"),
    "record:metrics": ("dpo_kit.trainer.recorder.append_row", "before"),
    "record:probe": ("dpo_kit.callbacks.probe.PairProbe._write", "before"),
    "finish:model": ("dpo_kit.trainer.finish.save_model", "before"),
    "finish:saved": ("dpo_kit.trainer.finish.save_model", "after"),
    "finish:report": ("dpo_kit.trainer.finish.refresh_page", "before"),
    "finish:result": ("dpo_kit.trainer.finish.refresh_page", "after"),
}


@dataclass
class Ended:
    """How a process ended: its exit code (negative: the signal), what it wrote, the seconds it took."""

    code: int
    text: str
    seconds: float


def run_cli(words, folder, *, fault=None, env=None, timeout=100, limit=None):
    """`python -m dpo_kit <words>` in `folder`, to its end."""
    return start_cli(words, folder, fault=fault, env=env, limit=limit).wait(timeout)


def start_cli(words, folder, *, fault=None, env=None, limit=None):
    """The same, running. `limit`: bytes that no file may exceed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"output-{time.time_ns()}.txt"
    process = _server().Process(
        target=_child, args=(list(words), folder, log, fault, dict(env or {}), limit), daemon=True
    )
    process.start()
    return Running(process, log)


class Running:
    """A forked command line."""

    def __init__(self, process, log):
        self.process, self.log, self.pid, self.started = process, log, process.pid, time.monotonic()

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_for(self, text, timeout=60):
        """Until the process has written `text`, or ended."""
        until = time.monotonic() + timeout
        while text not in self.text and self.process.is_alive():
            assert time.monotonic() < until, f"{text!r} did not appear in: {self.text}"
            time.sleep(0.02)

    def wait(self, timeout=100):
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self.text[-2000:]}")
        return Ended(self.process.exitcode, self.text, time.monotonic() - self.started)

    @property
    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm_faults"])
    return context


def _child(words, folder, log, fault, env, limit):
    os.setsid()
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from dpo_kit.cli import main as cli

    torch.set_num_threads(1)
    if fault:
        inject(fault)
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["dpo_kit", *words]
    cli.main()


# --- points and deeds --------------------------------------------------------------------------------------------


def inject(fault):
    """Change what is called at the fault's point, in this process."""
    point, number, deed = re.fullmatch(r"(.+?)(?:#(\d+))?:(\w+)", fault).groups()
    path, moment = POINTS[point]
    owner, name = find_owner(path)
    honest, calls = getattr(owner, name), itertools.count(1)

    def called(*args, **kwargs):
        now = next(calls) == int(number or 1)
        if now and moment == "before":
            DEEDS[deed](None, *args)
        result = honest(*args, **kwargs)
        return DEEDS[deed](result, *args) if now and moment == "after" else result

    setattr(owner, name, called)


def find_owner(path):
    """The object that holds the last name of a dotted path, and that name."""
    words = path.split(".")
    for size in range(len(words) - 1, 0, -1):
        with contextlib.suppress(ImportError):
            owner = importlib.import_module(".".join(words[:size]))
            for word in words[size:-1]:
                owner = getattr(owner, word)
            return owner, words[-1]
    raise ImportError(path)


def send_self(number, times=1):
    def deed(result, *args):
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        return result

    return deed


def no_space(result, *args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def poison_gradient(result, trainer, model, *args):
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")


def times(factor):
    def deed(result, *args):
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    return deed


DEEDS = {
    "kill": send_self(signal.SIGKILL),
    "term": send_self(signal.SIGTERM),
    "int": send_self(signal.SIGINT),
    "twice": send_self(signal.SIGINT, times=2),
    "enospc": no_space,
    "nan": times(float("nan")),
    "inf": times(float("inf")),
    "grad": poison_gradient,
}


# --- the table ---------------------------------------------------------------------------------------------------


def fault(name, promise, *values, id=None):
    """A parameter set that tries the fault `name` against the promise (P1 to P11)."""
    return pytest.param(*values, id=id or name, marks=pytest.mark.fault(name, promise=promise))
