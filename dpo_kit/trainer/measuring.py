"""What is measured during a run and against which reference, and where the numbers go."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Prepared
from dpo_kit.model.load import load_reference
from dpo_kit.model.scoring import Reference
from dpo_kit.run.directory import RunDirectory
from dpo_kit.trainer.budget import Budget
from dpo_kit.trainer.recorder import Recorder, show_progress
from dpo_kit.trainer.rows import probe_rows
from dpo_kit.trainer.speed import shares_prefixes
from dpo_kit.trainer.start_check import StartCheck

if TYPE_CHECKING:
    from dpo_kit.run.tracking import Tracker

log = logging.getLogger(__name__)


class ProbeAlone:
    """Mixin before a TRL trainer: an evaluation during training is what its callbacks measure, in one pass over the
    held-out rows where TRL's own loop would make a second one."""

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
    """Give `trainer` everything that measures and records; nothing of it changes training. `began`: see Budget."""
    wanted = settings.callbacks
    trainer.add_callback(Recorder(run.metrics, tracker))
    reference = build_reference(trainer, settings, run)
    trainer.add_callback(StartCheck(trainer, reference))
    budget = Budget(trainer, settings, run, data.train, began)
    trainer.add_callback(budget)  # it decides how much is measured, so before those that do
    if data.kind == "prompts":
        log.info("the held-out rows have no answers: KL drift is measured, preferences are not")
    elif wanted.preference_margin or wanted.implicit_reward or wanted.metrics:
        from dpo_kit.trainer.probing import add_probe

        budget.probe = add_probe(trainer, settings, probe_rows(data, settings), run, reference)
    if wanted.kl_drift:
        from dpo_kit.trainer.probing import add_drift

        budget.drift = add_drift(trainer, settings, data.select, run, reference)
    for extra in wanted.extra:
        trainer.add_callback(instantiate(extra))
    if wanted.patience is not None:
        from dpo_kit.callbacks.callbacks import Patience

        trainer.add_callback(Patience(early_stopping_patience=wanted.patience))  # after what it waits for
    show_progress(trainer)


def build_reference(trainer: Any, settings: Settings, run: RunDirectory) -> Reference:
    """The step-0 model as the run's reference, or the other one that `model.reference` names."""

    def load() -> Any:
        """From its folder, computing as the policy does: else its values differ in the last bits."""
        loaded = load_reference(settings.model)
        if shares_prefixes(trainer.model):
            from dpo_kit.trainer.prefix import share_prefixes

            share_prefixes(loaded)
        return loaded

    has_own_reference = getattr(trainer, "ref_model", None) is not None
    needs_other = settings.model.reference is not None and not has_own_reference
    return Reference(
        trainer,
        model=load().to(trainer.model.device) if needs_other else None,
        reload=load,
        is_start=settings.model.reference is None,
        state_dir=run.probe_state,
    )
