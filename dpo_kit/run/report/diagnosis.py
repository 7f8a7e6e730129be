"""What a run's record says in plain words (diagnosis.yaml): few findings, with a remedy that holds for the method.

Pure functions of the rows of metrics.jsonl and the method file; no branch on a method's name. Which way beta helps is
read from `beta.higher` ("closer": a higher beta keeps the policy near the reference; "stronger": it strengthens the
preference term).
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.run.history import latest, series
from dpo_kit.run.measures import FLOOR, KL_FLOOR, LOGRATIOS, in_rounding, kl_key, learned, rounding_text

Rows = Sequence[Mapping[str, Any]]

ROUNDED = 0.75  # share of the trained weights that a step cannot change, from which on it is said
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
FLAT_NOISE = 2.0  # standard errors that the loss must move to count as moving
CERTAIN = 0.99  # accuracy that no preference data of people's reaches
FAR_NATS = 10.0  # reverse or forward KL per answer; the default budget of a sweep's choice
FAR_PER_TOKEN = 0.6
UNFELT = 0.1  # saturation below which the loss is still nearly linear in the margin, so that beta only scales it


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


@cache
def _texts() -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def find(name: str, /, change: dict[str, str] | None = None, **values: Any) -> Finding:
    """The finding `name` of diagnosis.yaml."""
    return Finding(**{part: text.format(**values) for part, text in _texts()[name].items()}, change=change or {})


def held_back(args: Any, steps: int, rounded: float) -> Iterator[Finding]:
    """What keeps a run of `steps` with the TRL arguments `args` from moving, known before it starts.

    `rounded`: share of the trained weights for which a step of the learning rate is below their rounding.
    """
    rate, warmup = args.learning_rate, args.get_warmup_steps(steps)
    if rounded > ROUNDED:
        yield find("rounded weights", rate=rate, rounded=rounded, change={"model.dtype": "auto"})
    if warmup >= steps and args.lr_scheduler_type not in NO_WARMUP:
        change = {"trl.warmup_steps": "0.1"} if steps > 1 else {}
        reached = (steps - 1) / warmup
        yield find("only warm-up", warmup=warmup, steps=steps, reached=reached, rate=rate, change=change)


def diagnose(history: Rows, method: Mapping[str, Any]) -> list[Finding]:
    """The findings for a run, most telling first; `history`: rows of metrics.jsonl, `method`: its config block."""
    for stands_still in (lost_in_rounding, loss_flat):  # such a run has no more to say
        if finding := stands_still(history, method):
            return [finding]
    return [finding for check in CHECKS if (finding := check(history, method))]


def lost_in_rounding(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """Held-out answers have moved no further than rounding alone moves one, and their margin shows nothing learned."""
    values = latest(history)
    if not in_rounding("probe/accuracy", values):
        return None
    return find("lost in rounding", rounding=rounding_text(values).capitalize())


def loss_flat(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """The loss stays within its noise, and held-out rows show nothing learned either."""
    losses = list(series(history, "loss").values())
    part = len(losses) // 4
    if part < 2 or learned(latest(history)) is not False:
        return None
    first, last = losses[:part], losses[-part:]
    noise = math.sqrt(statistics.variance(first) / part + statistics.variance(last) / part)
    if statistics.fmean(first) - statistics.fmean(last) > FLAT_NOISE * noise + 1e-9:
        return None
    return find("flat loss", **method["learning_rate"])


def both_fall(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """The margin rises while both answers lose likelihood: chosen at least half of the margin, and still falling."""
    chosen, rejected = (list(series(history, key).values()) for key in LOGRATIOS.values())
    if min(len(chosen), len(rejected)) < 4 or not learned(latest(history)):
        return None
    half, end = chosen[len(chosen) // 2], chosen[-1]
    if max(end, rejected[-1]) > -max(1.0, latest(history).get(FLOOR, 0.0)) or end > -0.5 * (end - rejected[-1]):
        return None
    if half - end < 0.25 * abs(end) or end > chosen[-2]:
        return None
    return find("both fall", end=end, hold_back=_hold_back(method))


def certain_at_once(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """Held-out accuracy is next to 1 at the first measurement after step 0, or within a fifth of the run."""
    accuracy = {step: value for step, value in series(history, "probe/accuracy").items() if step > 0}
    if not accuracy:
        return None
    first = next(iter(accuracy))
    early = [value for step, value in accuracy.items() if step <= max(first, 0.2 * max(accuracy))]
    if max(early) < CERTAIN:
        return None
    rule = list(series(history, "probe/length_rule_accuracy").values())
    clue = f" (and taking the longer answer is right in {rule[-1]:.0%})" if rule and rule[-1] > 0.75 else ""
    return find("certain at once", accuracy=max(early), step=first, clue=clue)


def drift_explodes(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """The KL per answer is large, and so per token or grown threefold over the second half."""
    measured = {key for row in history for key in row}
    for direction in ("reverse", "forward"):
        key = kl_key(direction, measured)
        values = list(series(history, key).values())
        per_token = list(series(history, f"{key}_per_token").values()) or [0.0]
        if len(values) < 3 or values[-1] <= max(FAR_NATS, latest(history).get(KL_FLOOR, 0.0)):
            continue
        if values[-1] >= 3 * values[len(values) // 2] or per_token[-1] > FAR_PER_TOKEN:
            return find("drift explodes", nats=values[-1], direction=direction, hold_back=_hold_back(method))
    return None


def over_optimised(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """Where the gold reward is known: it ends beyond its interval below its best, while the margin is up."""
    reward, low, high = (series(history, f"gold/reward{end}") for end in ("", "_low", "_high"))
    if len(reward) < 2 or not learned(latest(history)):
        return None
    best, last = max(reward, key=reward.__getitem__), max(reward)
    if high.get(last, math.inf) >= low.get(best, -math.inf):
        return None
    hold_back = _hold_back(method)
    return find("over-optimised", best=reward[best], best_step=best, last=reward[last], hold_back=hold_back)


def beta_unfelt(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """The loss does not saturate at the end, so that neighbouring betas would give nearly the same run."""
    saturation = list(series(history, "probe/saturation").values())
    if len(saturation) < 2 or saturation[-1] >= UNFELT or in_rounding("probe/saturation", latest(history)):
        return None
    return find("beta unfelt", saturation=saturation[-1])


CHECKS = (drift_explodes, over_optimised, certain_at_once, both_fall, beta_unfelt)


def _hold_back(method: Mapping[str, Any]) -> str:
    """Which way to turn beta so that the policy moves less."""
    beta = method["beta"]
    grid = ", ".join(f"{value:g}" for value in beta["grid"])
    if beta["higher"] == "closer":
        return f"raise beta, which keeps the policy closer to the reference (this method's grid: {grid})"
    return f"lower beta, which weakens the preference term (this method's grid: {grid})"
