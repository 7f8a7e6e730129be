"""One of the models that an evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.settings import Model


@dataclass(frozen=True)
class Candidate:
    """A policy, its reference or any other model: what it is called, how it is loaded, and what a run made of it.

    `tuned` is the folder that a run left (whole weights, or an adapter on `model.path`); None: `model.path` itself.
    """

    name: str
    model: Model
    tuned: Path | None = None

    def load(self) -> Any:
        """The weights, in evaluation mode. ModelError where they cannot be loaded."""
        from dpo_kit.model import load_reference, load_tuned

        return load_tuned(self.model, self.tuned).eval() if self.tuned else load_reference(self.model)

    def tokenizer(self) -> Any:
        """The tokenizer of `model.path`, which reads control tokens in messages as text."""
        from dpo_kit.model import load_tokenizer

        return load_tokenizer(self.model)
