"""The embedded default: a tiny chat model, preference pairs sampled from it, and the gold reward that labels them.

`MODEL`, `TRAIN`, `EVAL`, `BIASED_TRAIN`, `BIASED_EVAL` and `IDEAL` are the files; `domain.py` says what they mean and
`build.py` makes them.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_kit.toy.domain import Prompt, capability_prompts, capability_score, gold_reward, gold_rewards

__all__ = ["BIASED_EVAL", "BIASED_TRAIN", "EVAL", "IDEAL", "MAX_NEW_TOKENS", "MODEL", "TRAIN", "Prompt",
           "capability_prompts", "capability_score", "gold_reward", "gold_rewards", "is_out_of_its_world"]  # fmt: skip

_HERE = Path(__file__).parent
MODEL = _HERE / "model"
TRAIN, EVAL = _HERE / "train.jsonl", _HERE / "eval.jsonl"
IDEAL = _HERE / "ideal.json"
BIASED_TRAIN, BIASED_EVAL = _HERE / "biased_train.jsonl", _HERE / "biased_eval.jsonl"
MAX_NEW_TOKENS = 64
"""Tokens after which a sample is cut; the model's own replies end well before."""


def is_out_of_its_world(model: str, rows: Iterable[str]) -> bool:
    """Whether `model` is the embedded one, and some of the files `rows` are not its own."""
    return Path(model).is_relative_to(_HERE) and not all(Path(path).is_relative_to(_HERE) for path in rows)


def __getattr__(name: str) -> Any:
    """The truth of `domain.py`, which is loaded once somebody asks for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module("dpo_kit.toy.domain"), name)
