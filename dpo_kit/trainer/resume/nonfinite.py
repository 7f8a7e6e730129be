"""Numbers that are not finite: found before they reach the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kit.errors import TrainingError


def refuse_non_finite(model: Any, where: str) -> None:
    """TrainingError where a weight that is trained is NaN or infinite: such a model is never saved."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if torch.nn.utils.get_total_norm(list(weights.values())).isfinite():  # one pass, one wait for the device
        return
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{len(broken)} weights are not finite {where} ({broken[0]}): nothing of it is saved. Lower "
            "trl.learning_rate, or look for rows whose answers are cut away in data_report.json"
        )


def all_finite(losses: Sequence[Tensor], norm: Any) -> bool:
    """Whether the losses of a step and the norm of its gradient are finite; waits once for the device."""
    values = [loss.detach().float().reshape(()) for loss in losses]
    if norm is not None:
        values.append(torch.as_tensor(norm, dtype=torch.float32, device=values[0].device if values else None))
    return not values or bool(torch.stack(values).isfinite().all())
