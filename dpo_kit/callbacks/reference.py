"""The reference of what is measured while a run trains, also once the model that training started from is gone."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from dpo_kit.errors import ModelError
from dpo_kit.model.scoring import ReferenceModel


class Reference(ReferenceModel):
    """The model that drift is measured against (`model`, `is_start`: see ReferenceModel), at step 0 and after.

    TRL moves its own under `sync_ref_model`, and the untrained policy (full tuning of ORPO, CPO, SimPO, or with
    precomputed log-probs) is gone once training began: what is needed of it is cached at step 0, and `reload` (which
    loads the start model anew) serves the rare measurements beyond that. `state_dir` keeps the cached values, so that a
    resumed run measures against the same step 0.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        model: Any | None = None,
        reload: Callable[[], Any] | None = None,
        is_start: bool = True,
        state_dir: Path | None = None,
    ) -> None:
        super().__init__(trainer, model=model, is_start=is_start)
        self.state_dir, self._reload = state_dir, reload
        self._loaded: Any | None = None

    @property
    def models(self) -> list[Any]:
        """The reference's own weights, where it has any beside the policy's."""
        return super().models if self._loaded is None else [*super().models, self._loaded]

    @property
    def live(self) -> bool:
        """Whether the reference can be run now, after training began."""
        moved = getattr(self.trainer.args, "sync_ref_model", False) and not self._given
        return self._loaded is not None or self._is_adapter or (self._model is not None and not moved)

    @property
    def reloaded(self) -> bool:
        """Whether it is the one that `reload` gave."""
        return self._loaded is not None

    @property
    def can_load(self) -> bool:
        """Whether the reference can be run now or be loaded anew."""
        return self.live or self._reload is not None

    @property
    def is_policy(self) -> bool:
        """Whether the policy itself, untrained, is the only reference at hand."""
        return not self.models and not self._is_adapter

    @contextmanager
    def loaded(self) -> Iterator[bool]:
        """For the length of the block the reference is live, loaded anew where it must be; yields whether it is."""
        if not self.live and self._reload is not None:
            self._loaded = self._reload().to(self._policy.device).eval()
        try:
            yield self.live
        finally:
            self._loaded = None

    @contextmanager
    def required(self, step: int) -> Iterator[Any]:
        """The reference after the start, loaded anew where it must be; ModelError where it is gone."""
        with self.loaded() as live:
            if not live:
                raise ModelError(
                    f"reference: measuring begins at step {step}, but the log-probabilities of step 0 are not in "
                    f"state_dir={self.state_dir} and the start model is gone; pass Reference(trainer, reload=...), a "
                    "function that loads the start model"
                )
            with self.active() as model:
                yield model

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Keep values in the state directory, replacing them in one step (main process only)."""
        if self.state_dir is None or not self.trainer.is_world_process_zero():
            return
        self.state_dir.mkdir(parents=True, exist_ok=True)
        partial = self.state_dir / f".{name}.partial"
        torch.save(values, partial)
        partial.replace(self.state_dir / f"{name}.pt")

    def load(self, name: str, fingerprint: str) -> dict[str, Any] | None:
        """Values kept under this name, or None where there are none with the same `fingerprint` entry."""
        if self.state_dir is None or not (path := self.state_dir / f"{name}.pt").exists():
            return None
        values: dict[str, Any] = torch.load(path, weights_only=True)
        return values if values["fingerprint"] == fingerprint else None


def fingerprint(values: Any) -> str:
    """Short hash of plain values, to tell whether what was kept of the reference belongs to the same inputs."""
    return sha256(json.dumps(values).encode()).hexdigest()[:16]
