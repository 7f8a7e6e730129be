"""The text of --help, drawn from conf/ so that it cannot go stale."""

import shutil
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from dpo_kit.config.compose import CONF, REPORTERS

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
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return text.format(groups="\n".join(groups), betas="\n".join(betas), experiments="\n".join(runs))


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
