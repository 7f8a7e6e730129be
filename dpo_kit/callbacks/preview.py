"""One trained run predicts runs of larger beta, by mixing its next-token logits with the reference's.

DeRa (arXiv:2402.02992): softmax((1 − λ)·h_ref + λ·h_policy) stands for the policy of beta/λ. With λ in (0, 1) this
interpolates between reference and policy. It is a prediction, not a measurement.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TrainerCallback

from dpo_kit.callbacks.drift import Drift, drift_metrics
from dpo_kit.callbacks.reference import Reference
from dpo_kit.model.batches import measuring
from dpo_kit.model.sampling import Sample
from dpo_kit.run.files import write_json


class Preview(TrainerCallback):
    """At the end of training: KL and gold reward that runs of larger `betas` would have, written to `path`.

    `drift` draws and compares (that of a `KLDrift`); `judge` says what fresh samples are worth, as metrics.
    """

    def __init__(
        self, drift: Drift, beta: float, betas: Sequence[float], path: Path, judge: Callable[[Sequence[Sample]], Any]
    ) -> None:
        self.drift, self.beta, self.path, self.judge = drift, beta, path, judge
        self.betas = [other for other in betas if other > beta]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reference = self.drift.reference
        with measuring(reference.trainer, *reference.models), reference.loaded() as live:
            points = []
            for beta in self.betas if live else ():
                share = self.beta / beta
                samples = self.drift.draw(self.drift.policy, partial(Mixed, reference, share=share))
                metrics = drift_metrics("reverse", self.drift.reverse(samples, share), samples)
                points.append({"beta": beta} | metrics | self.judge(samples))
            if live and reference.trainer.is_world_process_zero():
                write_json(self.path, {"from_beta": self.beta, "points": points})


class Mixed(LogitsProcessor):
    """Logits of (1 − share)·reference + share·policy while the policy generates; the reference has its own cache.

    `mask` (rows, prompt tokens) is the attention mask of the left-padded prompts.
    """

    def __init__(self, reference: Reference, mask: Tensor, share: float) -> None:
        self.reference, self.mask, self.share = reference, mask, share
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids if self._cache is None else input_ids[:, -1:]
        grown = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.nn.functional.pad(self.mask, (0, grown), value=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with self.reference.active() as model:
            output = model(
                input_ids=new,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = output.past_key_values
        return torch.lerp(output.logits[:, -1].to(scores), scores, self.share)
