"""The text of --help, drawn from conf/ so that it cannot go stale."""

from __future__ import annotations

import shutil
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from dpo_kit.config.compose import CONF, REPORTERS

USAGE = """\
dpo_kit: preference tuning on TRL, every number on one scale.

usage: python -m dpo_kit [group=option | key=value] …

  python -m dpo_kit                               train the embedded model on embedded pairs
  python -m dpo_kit method=ipo beta=0.2           another method, another beta
  python -m dpo_kit model=local model.path=DIR data=jsonl data.train=pairs.jsonl
  python -m dpo_kit trl.num_train_epochs=2        any field of TRL's own config
  python -m dpo_kit beta-sweep=standard           one run for each beta of a grid, each in its own process
  python -m dpo_kit -m beta=0.1,0.5 seed=0,1,2    any values of any keys; the same command goes on where it stopped
  python -m dpo_kit --cfg job                     print the composed config and stop
  python -m dpo_kit --config-dir DIR method=mine  add your own options to the groups

groups and their options (the first line of an option's file says what it is):
{groups}

what beta means (default; grid):
{betas}

published runs (experiment=NAME; what the source says and what it reached is in the option's file):
{experiments}
"""
GROUPS = ("method", "model", "data", "beta-sweep", "judge", "callbacks", "tracking", "experiment", "hydra/launcher")
PULL = {"closer": "Higher stays closer to the reference.", "stronger": "Higher pulls harder at the preferences."}


def help_text(config_dir: str | None = None) -> str:
    """Usage, groups with their options (those of `config_dir` too), and what beta means in each method."""
    roots = (CONF, *([Path(config_dir)] if config_dir else []))
    groups = [_entry(group, ", ".join(_options(group, roots)), 17) for group in GROUPS]
    betas, runs = [], []
    for name in _options("method", roots):
        method = _load("method", name, roots)
        beta, grid = method["method"]["beta"], ", ".join(f"{value:g}" for value in method["method"]["beta"]["grid"])
        text = f"{method['beta']:g}; {grid}. {beta['meaning']}. {PULL[beta['higher']]}"
        betas.append(_entry(name, text, 13))
    for name in _options("experiment", roots):
        if published := _load("experiment", name, roots).get("experiment"):
            runs.append(_entry(name, published["title"], 28))
    return USAGE.format(groups="\n".join(groups), betas="\n".join(betas), experiments="\n".join(runs))


def keys_of(group: str, *options: str) -> str:
    """The keys of some options of a group with their defaults and comments, as their files have them."""
    parts = []
    for option in options:
        text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
        title = f"{group}.…" if option == "default" else f"{group}={option}, with {group}.…"
        parts.append(f"{title}:\n{textwrap.indent(text, '  ')}")
    return "\n" + "\n".join(parts)


def _entry(name: str, text: str, column: int) -> str:
    width, start = min(100, shutil.get_terminal_size().columns), f"  {name:<{column - 2}}"
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * column, break_on_hyphens=False)


def _options(group: str, roots: tuple[Path, ...]) -> list[str]:
    added = {"tracking": REPORTERS, "hydra/launcher": ("processes",)}.get(group, ())
    return sorted({*(file.stem for root in roots for file in (root / group).glob("*.yaml")), *added})


@cache
def _load(group: str, name: str, roots: tuple[Path, ...]) -> Any:
    """A file of a group with what it inherits from others of that group."""
    file = next(path for root in roots if (path := root / group / f"{name}.yaml").exists())
    content = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    named = (entry for entry in content.get("defaults", []) if isinstance(entry, str))
    parents = [_load(group, entry, roots) for entry in named if not entry.startswith(("/", "_"))]
    return OmegaConf.to_container(OmegaConf.merge(*parents, content))
