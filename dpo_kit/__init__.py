"""dpo_kit: preference tuning on TRL, every number on one scale.

    from dpo_kit import compose, train
    result = train(compose(["method=ipo", "beta=0.2"]))

Heavy names (everything but `compose` and the errors) are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import ConfigError, DataError, DpoKitError, ModelError, TrainingError
from dpo_kit.run.quiet import quiet_imports

if TYPE_CHECKING:
    from dpo_kit.callbacks.callbacks import ImplicitReward, KLDrift, PreferenceMargin
    from dpo_kit.callbacks.probe import PairProbe
    from dpo_kit.config.compose import compose
    from dpo_kit.trainer.finish import Result
    from dpo_kit.training import train

__all__ = [
    "ConfigError",
    "DataError",
    "DpoKitError",
    "ImplicitReward",
    "KLDrift",
    "ModelError",
    "PairProbe",
    "PreferenceMargin",
    "Result",
    "TrainingError",
    "compose",
    "train",
]
_HOMES = {
    "ImplicitReward": "dpo_kit.callbacks.callbacks",
    "KLDrift": "dpo_kit.callbacks.callbacks",
    "PairProbe": "dpo_kit.callbacks.probe",
    "PreferenceMargin": "dpo_kit.callbacks.callbacks",
    "Result": "dpo_kit.trainer.finish",
    "compose": "dpo_kit.config.compose",
    "train": "dpo_kit.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpo_kit' has no attribute {name!r}")
    if name != "compose":  # which imports no torch
        quiet_imports()
    return getattr(importlib.import_module(_HOMES[name]), name)
