"""What the tools beside training share: `key=value`, `--help`, where they may write."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_kit.config.exits import DONE, guard
from dpo_kit.config.places import locate, refuse_unwritable
from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.run.words import with_home

Values = dict[str, str]


def run_tool(name: str, usage: str, arguments: Sequence[str] | None, work: Callable[[Sequence[str]], None]) -> int:
    """`guard` around `work`, called with `arguments` (None: the command line's); `--help` prints `usage` instead."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-h"} & set(given):
        sys.stdout.write(usage)
        return DONE
    return guard(f"dpo_kit {name}", given, lambda: work(given))


def usage(file: str) -> str:
    """What `--help` of the tool whose module is `file` begins with: the text beside it."""
    return Path(file).with_suffix(".txt").read_text(encoding="utf-8")


def parse(arguments: Sequence[str], keys: Sequence[str], *, needed: str | None = None, meaning: str = "") -> Values:
    """{key: value} of `key=value` arguments. ConfigError: what was meant, or the key `needed` (with its `meaning`)."""
    values: Values = {}
    for word in arguments:
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-"):
            raise ConfigError(f"arguments are key=value without dashes: {key}={value or '…'}")
        if not equals:
            raise ConfigError(f"arguments are key=value, got {word}; did you mean {needed or keys[0]}={word}?")
        if key not in keys:
            meant = did_you_mean(key, keys, f"; the keys are {', '.join(keys)}", cutoff=0.5)
            raise ConfigError(f"unknown key {key}{meant}")
        values[key] = with_home(value)
    if needed and not values.get(needed):
        raise ConfigError(f"{needed} is missing: add {needed}={meaning}")
    return values


def refuse_no_file(key: str, file: str | Path) -> None:
    """ConfigError where the file to be written, given as `key`, is a folder or stands where nothing can be written."""
    if locate(key, file).is_dir():
        raise ConfigError(f"{key}={file} is a folder: name a file, {key}={Path(file) / 'out.json'}")
    refuse_unwritable(key, locate(key, file).absolute().parent)


def refuse_existing(key: str, path: str | Path) -> None:
    """ConfigError where `path`, to be written anew, is there already or cannot be written."""
    refuse_unwritable(key, path)
    if locate(key, path).exists():
        raise ConfigError(f"{key}={path} is there already: delete it, or name another, {key}=…")


A_RUN_S = {"metrics.jsonl", "trl_config.json", "checkpoints", "sweep.json", "config.json", "adapter_config.json"}
WRITTEN = {
    "data_report.json", "manifest.json", "rejects.jsonl", "answers.jsonl", "opponent_answers.jsonl", "judgements.jsonl",
    "comparisons.jsonl", "pairs.jsonl", "result.json", "review.csv",
}  # fmt: skip


def refuse_foreign(key: str, folder: str | Path) -> None:
    """ConfigError where a tool's `folder` cannot be written, or holds a run, a model or files of others only."""
    refuse_unwritable(key, folder)
    path = locate(key, folder)
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if names and (names & A_RUN_S or not names & WRITTEN):
        some = ", ".join(sorted(names & A_RUN_S or names)[:3])
        raise ConfigError(f"{key}={folder} is a folder with other files in it ({some}): name a new one")
