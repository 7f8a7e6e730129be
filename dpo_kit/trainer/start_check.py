"""Step 0: before the first step, policy and reference agree on a sample of the training rows, or nothing is trained.

The probe checks the same on held-out rows, where it is on; this looks at what the loss itself will read: TRL's
reference model, the policy without its adapter, or the stored columns.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dpo_kit.model.batches import measuring
from dpo_kit.model.head import Tokens
from dpo_kit.model.load import rounded_share
from dpo_kit.model.scoring import Reference
from dpo_kit.run.report.diagnosis import Finding, held_back
from dpo_kit.trainer.arguments import count_steps
from dpo_kit.trainer.as_trained import COLUMNS, column_logps, score_as_trained

log = logging.getLogger(__name__)
ROWS = 16


class StartCheck(TrainerCallback):
    """Refuse (ModelError) a reference that is not the policy's start; report how far another one, meant, is from it.

    Limits: Reference.check_start. A resumed run skips it: its policy has moved on.
    """

    def __init__(self, trainer: Any, reference: Reference) -> None:
        self.trainer, self.reference = trainer, reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset = self.trainer.train_dataset
        compare = self._compare_given if set(COLUMNS) & set(dataset.column_names) else self._compare_fresh
        if state.global_step > 0 or (compare == self._compare_fresh and dataset.column_names != ["prompt"]):
            return
        sample = dataset.select(range(0, len(dataset), max(1, len(dataset) // ROWS))[:ROWS])
        with measuring(self.trainer, *self.reference.models, as_trained=True):
            differences, tokens = compare(sample)
        offset = self.reference.check_start(differences, tokens, as_trained=True)
        if not self.reference.is_start:
            log.info("the reference is another model: at step 0 it differs by up to %.3g nats an answer", offset)

    def _compare_given(self, sample: Any) -> tuple[Tensor, Tensor]:
        """Policy less reference on the answers of `sample`, and the tokens of each: (answers,) twice."""
        policy = column_logps(self.trainer, sample, self._scorer(self.trainer.model))
        stored = {column: torch.tensor(sample[column]) for column in policy if column in sample.column_names}
        theirs = stored or self._live(sample)
        differences = torch.cat([policy[column] - theirs[column] for column in theirs])
        return differences, torch.cat([_lengths(sample, column) for column in theirs])

    def _compare_fresh(self, sample: Any) -> tuple[Tensor, Tensor]:
        """The same on answers of the policy, where it trains on those."""
        from dpo_kit.model.sampling import draw_samples

        tokenizer, length = self.trainer.processing_class, self.trainer.args.max_new_tokens
        rows = [{"prompt": json.loads(row["prompt"])} for row in sample]
        drawn = draw_samples(self.trainer.model, tokenizer, rows, max_new_tokens=length)
        answers = [(each.prompt_ids, each.token_ids) for each in drawn]
        policy = self._scorer(self.trainer.model)(answers)
        with self.reference.active() as model:
            differences = policy - self._scorer(model)(answers)
        return differences, torch.tensor([len(ids) for _, ids in answers])

    def _live(self, sample: Any) -> dict[str, Tensor]:
        with self.reference.active() as model:
            return column_logps(self.trainer, sample, self._scorer(model))

    def _scorer(self, model: Any) -> Any:
        def scorer(sequences: Sequence[Tokens]) -> Tensor:
            return score_as_trained(self.trainer, model, sequences)

        return scorer


def findings_before_training(trainer: Any, rows: int) -> list[Finding]:
    """What will keep a run on `rows` rows from moving, said before its first step (see diagnosis.held_back)."""
    steps = count_steps(trainer.args.to_dict(), rows)
    findings = [*held_back(trainer.args, steps, rounded_share(trainer.model, trainer.args.learning_rate))]
    for finding in findings:
        log.warning("%s %s", finding.symptom, finding.remedy)
    return findings


def _lengths(sample: Any, column: str) -> Tensor:
    """Tokens of the answers that a column of the reference belongs to: (rows,)."""
    (answers,) = (name for name, of_reference in COLUMNS.items() if of_reference == column)
    return torch.tensor([len(ids) for ids in sample[answers]])
