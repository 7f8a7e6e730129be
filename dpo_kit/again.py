"""What to type next: the command of a run with some of its keys changed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def again(command: str | None, method: str | None, *multirun: str, **changed: str) -> str:
    """`command` (None where nothing was typed: that `method`) with the `changed` keys, and without those of Hydra."""
    typed = shlex.split(command or "")[3:] or [f"method={method}"]
    kept = [word for word in typed if word.partition("=")[0] not in changed and not word.startswith("hydra.")]
    words = [*multirun, *kept, *(f"{key}={value}" for key, value in changed.items())]
    return shlex.join(["python", "-m", "dpo_kit", *words])


def longer(trl: Mapping[str, Any]) -> dict[str, str]:
    """The override, as key and value, that makes a run with the TRL arguments `trl` twice as long."""
    steps, epochs = trl.get("max_steps") or 0, trl.get("num_train_epochs") or 1
    return {"trl.max_steps": f"{2 * steps:g}"} if steps > 0 else {"trl.num_train_epochs": f"{2 * epochs:g}"}
