"""Preference files of our own making, and the way from a file to rows, for the tests of data."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dpo_kit.config.settings import Data
from dpo_kit.data.gather import Gathered, Rows, gather
from dpo_kit.data.prepare import Prepared, prepare, split
from dpo_kit.data.report.inspect import inspect
from dpo_kit.toy import MODEL

WORDS = [
    "river", "stone", "market", "window", "garden", "engine", "letter", "winter", "bridge", "copper", "forest",
    "ladder", "mirror", "pocket", "saddle", "tunnel", "violet", "wagon", "yellow", "anchor", "basket", "candle",
    "dragon", "emerald", "feather", "ginger", "harbor", "island", "jacket", "kettle", "lantern", "meadow",
    "needle", "orchard", "pepper", "quarry", "ribbon", "silver", "temple", "umbrella", "valley", "whisper",
    "crystal", "falcon", "goblet", "hollow", "ivory", "jungle",
]  # fmt: skip


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def pairs(count: int, seed: int = 0, prompt: int = 12, answer: int = 40) -> list[dict[str, Any]]:
    """Random pairs of text with different prompts; lengths in words."""
    rng = random.Random(seed)
    return [
        {"prompt": words(rng, prompt), "chosen": words(rng, answer), "rejected": words(rng, answer)}
        for _ in range(count)
    ]


def labels(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random unary rows, every third one a thumbs down."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": index % 3 > 0}
        for index, row in enumerate(pairs(count, seed))
    ]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Rows, or raw lines."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def data(train: Any, **options: Any) -> Data:
    given = {
        "train": train,
        "eval": None,
        "train_split": "train",
        "eval_split": None,
        "columns": {},
        "holdout": 0.2,
        "wrap_as_chat": "auto",
        "on_bad_row": "fail",
        "gold": None,
    }
    return Data(**(given | options))


def prepared(train: Any, *, wanted: Any = "pairs", max_length: int | None = 512, **options: Any) -> Prepared:
    """A file through the whole path of training."""
    return prepare(
        data(train, **options),
        wanted=wanted,
        tokenizer=tokenizer(),
        max_length=max_length,
        truncation="keep_start",
        seed=0,
    )


def gathered(train: Any, *, max_length: int | None = None, **options: Any) -> tuple[Gathered, list[Rows], Rows]:
    """A file as the data tool sees it."""
    found = gather(data(train, **options), tokenizer(), refuse=False)
    return found, *split(found, data(train, **options), max_length, "keep_start")


def report(train: Any, *, max_length: int | None = None, benchmark: str | None = None, **options: Any) -> Any:
    """The thorough report on a file."""
    found, rows, held_out = gathered(train, max_length=max_length, **options)
    return inspect(found, rows, held_out, wanted="pairs", max_length=max_length, benchmark=benchmark, thorough=True)
