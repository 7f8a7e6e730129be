"""TRL's classes by their names in the method files, and what they are able to do."""

from __future__ import annotations

import importlib
import inspect
from typing import Any


def import_class(path: str) -> Any:
    """The class at `path`, such as trl.DPOTrainer."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def uses_fused_head(trainer: type) -> bool:
    """Whether log-probabilities come from hidden states and the LM head's weights, without logits of every position."""
    of_trl = (each for each in trainer.__mro__ if each.__module__.startswith("trl."))
    return any("fused_lm_head" in inspect.getsource(each) for each in of_trl)
