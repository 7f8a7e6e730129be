"""Step 0, what is measured during a run and against which reference, and where the numbers go."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from torch import Tensor
from transformers import TrainerCallback

from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Prepared
from dpo_kit.model.batches import measuring
from dpo_kit.model.load import load_reference, rounded_share
from dpo_kit.model.scoring import COLUMNS, ReferenceModel, column_logps, score_as_trained
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.report.findings import Finding, held_back
from dpo_kit.trainer.arguments import count_steps
from dpo_kit.trainer.recorder import Recorder, show_progress
from dpo_kit.trainer.speed import shares_prefixes

if TYPE_CHECKING:
    from dpo_kit.run.tracking import Tracker

log = logging.getLogger(__name__)
CHECKED = 16  # training rows, before the first step


class ProbeAlone:
    """Mixin before a TRL trainer: an evaluation is what its callbacks measure, one pass instead of two."""

    def evaluate(self, eval_dataset: Any = None, **given: Any) -> dict[str, float]:
        """What the callbacks add to an evaluation's metrics; TRL's evaluation where it is asked for other rows."""
        trainer: Any = self
        if eval_dataset is not None:
            return super().evaluate(eval_dataset, **given)  # type: ignore[misc]
        metrics: dict[str, float] = {}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


def add_callbacks(
    trainer: Any, settings: Settings, data: Prepared, run: RunDirectory, tracker: Tracker | None, began: float
) -> None:
    """Give `trainer` everything that measures and records, against the step-0 model or the one that `model.reference`
    names; nothing of it changes training. `began`: when the run did (`time.time()`).
    """

    def load() -> Any:
        """The reference from its folder, computing as the policy does: else its values differ in the last bits."""
        loaded = load_reference(settings.model)
        if shares_prefixes(trainer.model):
            from dpo_kit.trainer.prefix import share_prefixes

            share_prefixes(loaded)
        return loaded

    wanted, is_start = settings.callbacks, settings.model.reference is None
    trainer.add_callback(Recorder(run.metrics, tracker))
    lacks_other = not is_start and getattr(trainer, "ref_model", None) is None
    other = load().to(trainer.model.device) if lacks_other else None
    trainer.add_callback(StartCheck(trainer, ReferenceModel(trainer, model=other, is_start=is_start)))
    if data.kind == "prompts":
        log.info("the held-out rows have no answers: KL drift is measured, preferences are not")
    if wanted.kl_drift or (wanted.scores_rows and data.kind != "prompts"):
        from dpo_kit.callbacks.reference import Reference
        from dpo_kit.trainer.probing import add_measures

        reference = Reference(trainer, model=other, reload=load, is_start=is_start, state_dir=run.probe_state)
        add_measures(trainer, settings, data, run, reference, began)
    for extra in wanted.extra:
        trainer.add_callback(instantiate(extra))
    if wanted.patience is not None:
        from dpo_kit.callbacks.callbacks import Patience

        trainer.add_callback(Patience(early_stopping_patience=wanted.patience))  # after what it waits for
    show_progress(trainer)


class StartCheck(TrainerCallback):
    """Step 0: policy and reference agree on a sample of the training rows, or nothing is trained (ModelError, limits:
    ReferenceModel.check_start); how far another one, meant, is from it is said. A resumed run skips it.

    The probe checks the same on held-out rows, where it is on; this looks at what the loss itself will read: TRL's
    reference model, the policy without its adapter, or the stored columns.
    """

    def __init__(self, trainer: Any, reference: ReferenceModel) -> None:
        self.trainer, self.reference = trainer, reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset = self.trainer.train_dataset
        given = bool(set(COLUMNS) & set(dataset.column_names))
        if state.global_step > 0 or not (given or dataset.column_names == ["prompt"]):
            return
        sample = dataset.select(range(0, len(dataset), max(1, len(dataset) // CHECKED))[:CHECKED])
        with measuring(self.trainer, *self.reference.models, as_trained=True):
            if given:
                differences, tokens = self._compare_given(sample)
            else:
                from dpo_kit.trainer.online import compare_fresh

                differences, tokens = compare_fresh(self.trainer, self.reference, sample)
        offset = self.reference.check_start(differences, tokens, as_trained=True)
        if not self.reference.is_start:
            log.info("the reference is another model: at step 0 it differs by up to %.3g nats an answer", offset)

    def _compare_given(self, sample: Any) -> tuple[Tensor, Tensor]:
        """Policy less reference on the answers of `sample`, and the tokens of each: (answers,) twice."""
        policy = column_logps(self.trainer, sample, partial(score_as_trained, self.trainer, self.trainer.model))
        theirs = {column: torch.tensor(sample[column]) for column in policy if column in sample.column_names}
        if not theirs:  # none were stored
            with self.reference.active() as model:
                theirs = column_logps(self.trainer, sample, partial(score_as_trained, self.trainer, model))
        answers = {column: name for name, column in COLUMNS.items()}
        differences = torch.cat([policy[column] - theirs[column] for column in theirs])
        return differences, torch.tensor([len(ids) for column in theirs for ids in sample[answers[column]]])


def spent(trainer: Any) -> float:
    """Seconds that measuring has taken in a run, over all its starts; TRL's own evaluations among it."""
    own = (getattr(callback, "measuring_seconds", 0.0) for callback in trainer.callback_handler.callbacks)
    return sum(own) + sum(row.get("eval_runtime", 0.0) for row in trainer.state.log_history)


def findings_before_training(trainer: Any, rows: int) -> list[Finding]:
    """What will keep a run on `rows` rows from moving, said before its first step (see findings.held_back)."""
    steps = count_steps(trainer.args.to_dict(), rows)
    findings = [*held_back(trainer.args, steps, rounded_share(trainer.model, trainer.args.learning_rate))]
    for finding in findings:
        log.warning("%s %s", finding.symptom, finding.remedy)
    return findings
