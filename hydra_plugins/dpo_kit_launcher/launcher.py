"""hydra/launcher=processes: every job of a sweep in a process of its own, on its own devices."""

# No `from __future__ import annotations`: Hydra executes this file before it is in sys.modules, where dataclasses
# look up annotations that are strings, and every start of every Hydra program would fail.
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class ProcessLauncherConf:
    """The options under hydra.launcher."""

    _target_: str = "hydra_plugins.dpo_kit_launcher.launcher.ProcessLauncher"
    jobs: int | None = None  # at a time; null: one per device slot, one on a machine without GPU
    devices: list[str] | None = None  # null: every visible GPU; one named twice takes two jobs at a time
    devices_per_job: int = 1
    command: list[str] = field(default_factory=list)  # before `python -m …`, such as [accelerate, launch, …]
    timeout_minutes: float | None = None  # a job beyond it is ended
    grace_seconds: float = 60.0  # for a job that is ended, to save at its next step


ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessLauncherConf, provider="dpo_kit")


class ProcessLauncher(Launcher):
    """The face that Hydra sees; the work is done in dpo_kit.sweep."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `launch` needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; their return values in the same order."""
        from dpo_kit.sweep.launch.launcher import Sweep

        sweep = Sweep(self.options, self.config, self.hydra_context, self.task_function)
        return sweep.launch(job_overrides, initial_job_idx)
