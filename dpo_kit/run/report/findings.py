"""What is off in a run, in plain words (findings.yaml), and what of it is known before the first step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.run.files import texts

ROUNDED = 0.75  # share of the trained weights that a step cannot change, from which on it is said
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class Finding:
    """One thing that is off: what is seen, what it means, what to do; and the keys that the next command changes."""

    symptom: str
    meaning: str
    remedy: str
    change: dict[str, str] = field(default_factory=dict)

    def saved(self) -> dict[str, str]:
        """As result.json has it."""
        return {"symptom": self.symptom, "meaning": self.meaning, "remedy": self.remedy}


def find(name: str, /, change: dict[str, str] | None = None, **values: Any) -> Finding:
    """The finding `name` of findings.yaml."""
    return Finding(**{part: text.format(**values) for part, text in texts(__file__)[name].items()}, change=change or {})


def held_back(args: Any, steps: int, rounded: float) -> Iterator[Finding]:
    """What keeps a run of `steps` with the TRL arguments `args` from moving, known before it starts; `rounded`: share
    of the trained weights for which a step of the learning rate is below their rounding.
    """
    rate, warmup = args.learning_rate, args.get_warmup_steps(steps)
    if rounded > ROUNDED:
        yield find("rounded weights", rate=rate, rounded=rounded, change={"model.dtype": "auto"})
    if warmup >= steps and args.lr_scheduler_type not in NO_WARMUP:
        change = {"trl.warmup_steps": "0.1"} if steps > 1 else {}
        reached = (steps - 1) / warmup
        yield find("only warm-up", warmup=warmup, steps=steps, reached=reached, rate=rate, change=change)
