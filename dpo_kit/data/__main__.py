"""`python -m dpo_kit.data mode=build`: preference pairs from prompts, models and a judge."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from dpo_kit.config import compose_unchecked
from dpo_kit.data.build import build_pairs, show_build
from dpo_kit.errors import ConfigError
from dpo_kit.tool import run_tool

USAGE = """\
usage: python -m dpo_kit.data mode=build [group=option | key=value] …
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 1 where rows are missing that the same command may still bring, 2 refused."""
    return run_tool("data", USAGE, arguments, work)


def work(arguments: Sequence[str]) -> None:
    """Do what `arguments` (Hydra overrides) ask for."""
    cfg = compose_tool(arguments)
    if cfg.mode != "build":
        raise ConfigError(f"mode must be build, got {cfg.mode}")
    show_build(build_pairs(cfg))


def compose_tool(arguments: Sequence[str]) -> DictConfig:
    """The config of a run with the tool's own keys beside it. Raises ConfigError."""
    return compose_unchecked(["+tool=data", *arguments])


if __name__ == "__main__":
    sys.exit(main())
