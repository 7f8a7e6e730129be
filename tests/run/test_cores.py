"""Threads and the other programs on the same cores."""

import os
import sys
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

import dpo_kit
from dpo_kit.run import quiet
from dpo_kit.run.quiet import CROWDED_SPINS, SPINS, share_cores, used_cores


class Share(NamedTuple):
    user: float
    nice: float
    system: float
    idle: float


@pytest.fixture
def before_torch(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return monkeypatch


@pytest.mark.parametrize(("used", "spins"), [(0.0, SPINS), (0.5, SPINS), (0.6, CROWDED_SPINS), (2.0, CROWDED_SPINS)])
def test_threads_sleep_soon_where_others_use_a_quarter_of_the_cores(before_torch, used, spins, caplog):
    before_torch.setattr(quiet, "used_cores", lambda: (2, used))
    caplog.set_level("INFO")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == str(spins)
    assert caplog.messages == [f"other programs use {used:.1f} of 2 cores: threads that wait leave theirs to them"] * (
        spins == CROWDED_SPINS
    )


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_environment_says_of_waiting_stays(before_torch, name, value):
    before_torch.setenv(name, value)
    before_torch.setattr(quiet, "used_cores", lambda: pytest.fail("nobody needs to look"))
    share_cores()
    assert os.environ[name] == value and len(os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}) == 1


def test_only_allowed_cores_count_and_programs_of_any_priority_on_them(monkeypatch):
    each = [Share(50, 0, 10, 40), Share(100, 0, 0, 0), Share(0, 90, 0, 10)]
    monkeypatch.setattr(psutil, "cpu_times_percent", lambda interval, percpu: each)
    monkeypatch.setattr(psutil, "LINUX", True)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 2], raising=False)
    assert used_cores() == (2, pytest.approx(1.5))


def test_whoever_imports_torch_looks_first_and_composing_does_not(monkeypatch):
    order = []
    monkeypatch.setattr(quiet, "share_cores", lambda: order.append("look"))
    monkeypatch.setattr(
        dpo_kit.importlib, "import_module", lambda name: order.append(name) or SimpleNamespace(train=1, compose=2)
    )
    assert (dpo_kit.__getattr__("compose"), dpo_kit.__getattr__("train")) == (2, 1)
    assert order == ["dpo_kit.config.compose", "look", "dpo_kit.training"]
