"""How what surrounds training is put before a TRL trainer: a list of mixins, each beside what it does."""

from __future__ import annotations

from typing import Any

from dpo_kit.config.settings import Settings
from dpo_kit.data.rows import Rows
from dpo_kit.trainer.arguments import uses_store
from dpo_kit.trainer.given_tokens import GivenTokens
from dpo_kit.trainer.measuring import ProbeAlone
from dpo_kit.trainer.resume.safe_trainer import Safekeeping


def choose_mixins(settings: Settings, rows: Rows, *, evaluates: bool, grouped: bool, fresh: bool) -> list[type]:
    """The mixins of a run on `rows`, the first one outermost: whether TRL's own evaluation is used, whether batches
    hold rows of similar length, and whether answers are drawn while training.
    """
    mixins: list[type] = []
    if uses_store(settings, rows):
        from dpo_kit.trainer.reference_store import StoredReference

        mixins.append(StoredReference)
    if not evaluates:
        mixins.append(ProbeAlone)
    if grouped:
        from dpo_kit.trainer.grouping import GroupedByLength

        mixins.append(GroupedByLength)
    mixins.append(Safekeeping)
    if not fresh:
        return [*mixins, GivenTokens]
    from dpo_kit.trainer.online import FreshAnswers

    return [*mixins, FreshAnswers]


def with_mixins(trainer: type, *mixins: type, **values: Any) -> type:
    """The class `trainer`, under its own name, with `mixins` before it in the method resolution order and `values` as
    class attributes: what they need to know is there before the trainer is made.
    """
    return type(trainer.__name__, (*mixins, trainer), values)
