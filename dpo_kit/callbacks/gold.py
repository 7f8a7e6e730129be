"""Where the truth is known (`data.gold` names a module that has it): gold reward of fresh samples, capability, ceiling.

Such a module has `gold_rewards(prompts, answers) -> list[float]`, `capability_prompts() -> list[str]`,
`capability_score(prompts, answers) -> float` and `MAX_NEW_TOKENS`; dpo_kit.toy is the embedded one.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from dpo_kit.callbacks.metrics import bootstrap_interval, wilson
from dpo_kit.config.extensions import find_gold
from dpo_kit.model.batches import measuring
from dpo_kit.model.chats import answer_text
from dpo_kit.model.sampling import Sample, draw_samples

NEEDED = ("gold_rewards", "capability_prompts", "capability_score", "MAX_NEW_TOKENS")


def load_gold(path: str) -> Any:
    """The module at `path`. Raises ConfigError where it is not there or not complete."""
    return find_gold(path, "data.gold", NEEDED)


def label_ceiling(gold: Any, pairs: Sequence[dict[str, Any]]) -> float:
    """The accuracy that the gold reward itself reaches on labelled pairs: no policy can be expected above it."""
    prompts = [pair["prompt"] for pair in pairs]
    texts = ([answer_text(pair[side]) for pair in pairs] for side in ("chosen", "rejected"))
    chosen, rejected = (gold.gold_rewards(prompts, each) for each in texts)
    return statistics.fmean(0.5 * ((c > r) + (c >= r)) for c, r in zip(chosen, rejected, strict=True))


class GoldFigures:
    """What the gold reward says of KLDrift's fresh samples: mean with a 95 % interval by prompt; and the capability."""

    def __init__(self, gold: Any, trainer: Any) -> None:
        self.gold, self.trainer = gold, trainer

    def reward(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The mean gold reward of `samples` and its interval."""
        rewards = self.gold.gold_rewards([s.row["prompt"] for s in samples], [s.text for s in samples])
        low, high = bootstrap_interval(torch.tensor(rewards), [s.row["prompt_id"] for s in samples])
        return {"gold/reward": statistics.fmean(rewards), "gold/reward_low": low, "gold/reward_high": high}

    def __call__(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Of the capability the share that is right, of how many, and its Wilson interval."""
        prompts = self.gold.capability_prompts()
        with measuring(self.trainer):
            drawn = draw_samples(
                self.trainer.model,
                self.trainer.processing_class,
                [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts],
                max_new_tokens=self.gold.MAX_NEW_TOKENS,
                accelerator=self.trainer.accelerator,
            )
        share = self.gold.capability_score(prompts, [sample.text for sample in drawn])
        ends = wilson(share, len(prompts)) if 0 <= share <= 1 else ()  # a module may count otherwise
        interval = dict(zip(("gold/capability_low", "gold/capability_high"), ends, strict=False))
        return self.reward(samples) | {"gold/capability": share, **interval, "gold/capability_prompts": len(prompts)}
