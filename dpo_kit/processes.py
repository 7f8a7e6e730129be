"""Several processes that train one run together, started by torchrun or `accelerate launch`. No torch until needed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dpo_kit.errors import ConfigError

KEY = "dpo_kit/run_dir"
RUN_DIR = "hydra.run.dir="
QUIET = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_writer() -> bool:
    """Whether this process writes the run directory: of several that train together, the first."""
    return rank() == 0


def rank() -> int:
    """The place of this process among those that train together."""
    return int(os.environ.get("RANK", "0"))


def agree(overrides: Sequence[str], proposed: str) -> list[str]:
    """What a process of several adds to the command line: one run directory for all, and only the first one's log.

    `proposed` is the directory that this process would take by itself. ConfigError where nothing shares it.
    """
    added = [] if is_writer() else QUIET
    if any(word.startswith(RUN_DIR) for word in overrides):
        return list(added)
    return [f"{RUN_DIR}'{_share(proposed)}'", *added]


def _share(proposed: str) -> str:
    """The first process's directory, through the store that torchrun keeps for its processes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ConfigError(
            f"{world_size()} processes that train together need one directory: add {RUN_DIR}outputs/<name>, or start "
            "them with torchrun or accelerate launch"
        )
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))
    if is_writer():
        store.set(KEY, proposed)
    return store.get(KEY).decode()


def refuse_sweep(overrides: Sequence[str]) -> None:
    """ConfigError: each job of a sweep is a process of its own, so the launcher belongs inside it."""
    if world_size() == 1:
        return
    words = " ".join(word for word in overrides if not word.startswith("beta-sweep="))
    raise ConfigError(
        f"a sweep inside a launcher would run {world_size()} times: start `python -m dpo_kit` without the launcher, "
        f"each job on devices of its own, or one run a time inside it, as `accelerate launch -m dpo_kit {words}`"
    )
