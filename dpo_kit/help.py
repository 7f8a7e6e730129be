"""The text of --help, drawn from conf/ so that it cannot go stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dpo_kit.config import CONF, REPORTERS

USAGE = """\
dpo_kit: preference tuning on TRL, every number on one scale.

usage: python -m dpo_kit [group=option | key=value] …

  python -m dpo_kit                              train the embedded model on embedded pairs
  python -m dpo_kit method=ipo beta=0.2          another method, another beta
  python -m dpo_kit model=local model.path=DIR data=jsonl data.train=pairs.jsonl
  python -m dpo_kit trl.num_train_epochs=2       any field of TRL's own config
  python -m dpo_kit --cfg job                    print the composed config and stop
  python -m dpo_kit --config-dir DIR method=mine add your own options to the groups

groups and their options:
{groups}

what beta means (default, grid):
{betas}
"""


def help_text() -> str:
    """Usage, groups with their options, and what beta means in each method."""
    return USAGE.format(groups="\n".join(_group_lines()), betas="\n".join(_beta_lines()))


def _group_lines() -> list[str]:
    groups = ("method", "model", "data", "beta-sweep", "callbacks", "tracking", "experiment")
    return [f"  {group:<11}{', '.join(_options(group))}" for group in groups]


def _options(group: str) -> list[str]:
    added = REPORTERS if group == "tracking" else ()
    return sorted({*(file.stem for file in (CONF / group).glob("*.yaml")), *added})


def _beta_lines() -> list[str]:
    return [_beta_line(_load_method(CONF / "method" / f"{name}.yaml")) for name in _options("method")]


def _beta_line(cfg: Any) -> str:
    beta, grid = cfg.method.beta, ", ".join(f"{value:g}" for value in cfg.method.beta.grid)
    pull = {"closer": "higher stays closer to the reference", "stronger": "higher pulls harder at the preferences"}
    return f"  {cfg.method.name:<9} {cfg.beta:<4g} ({grid})  {beta.meaning}; {pull[beta.higher]}"


def _load_method(file: Path) -> DictConfig:
    cfg = OmegaConf.load(file)
    parents = [name for name in cfg.pop("defaults", []) if not name.startswith(("/", "_"))]
    return OmegaConf.merge(*(_load_method(file.with_stem(name)) for name in parents), cfg)  # type: ignore[return-value]
