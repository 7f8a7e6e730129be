"""The embedded default: a tiny chat model, preference pairs sampled from it, and the gold reward that labels them.

`MODEL`, `TRAIN`, `EVAL`, `BIASED_TRAIN`, `BIASED_EVAL` and `IDEAL` are the files; `domain.py` says what they mean and
`build.py` makes them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dpo_kit.toy import domain
from dpo_kit.toy.domain import Prompt, capability_prompts, gold_reward

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


def gold_rewards(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    """The gold reward of each answer, in points. ValueError: unequal lengths, or a foreign prompt."""
    return [gold_reward(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def capability_score(prompts: Sequence[Prompt], answers: Sequence[str]) -> float:
    """Share (0 to 1) of `capability_prompts()` answered rightly. ValueError: unequal lengths, or no prompt at all."""
    if not prompts:
        raise ValueError("capability_score needs at least one prompt; take them from capability_prompts()")
    right = [domain.is_right(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return sum(right) / len(right)
