"""Several processes that train one run together, started by torchrun or `accelerate launch`. No torch until needed."""

import os
from collections.abc import Sequence
from pathlib import Path

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
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ConfigError(
            f"{world_size()} processes that train together need one directory: add {RUN_DIR}outputs/<name>, or start "
            "them with torchrun or accelerate launch"
        )
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))  # the one that torchrun keeps for its processes
    if is_writer():
        store.set(KEY, proposed)
    return [f"{RUN_DIR}'{store.get(KEY).decode()}'", *added]


LAUNCHERS = {"torchrun", "accelerate"}
LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"}  # as modules


def launcher() -> list[str]:
    """The words before `-m dpo_kit` with which torchrun or accelerate was told to start this process; [] without."""
    try:
        typed = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
        words = typed[: typed.index("dpo_kit") - 1]
    except (OSError, ValueError):
        words = []
    if {Path(word).name for word in words[:3]} & LAUNCHERS:
        start = 1 if words[1:2] != ["-m"] else 0  # of `python /…/bin/torchrun …` the program alone
        return [Path(words[start]).name, *words[start + 1 :]]
    return ["torchrun", "--nproc_per_node", str(world_size())] if world_size() > 1 else []
