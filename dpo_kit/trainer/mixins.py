"""How what surrounds training is put before a TRL trainer: a list of mixins, each beside what it does."""

from __future__ import annotations

from typing import Any


def with_mixins(trainer: type, *mixins: type, **values: Any) -> type:
    """The class `trainer`, under its own name, with `mixins` before it in the method resolution order and `values` as
    class attributes: what they need to know is there before the trainer is made.
    """
    return type(trainer.__name__, (*mixins, trainer), values)
