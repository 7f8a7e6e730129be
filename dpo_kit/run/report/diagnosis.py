"""What a run's record says in plain words (findings.yaml): few findings, with a remedy that holds for the method.

Pure functions of the rows of metrics.jsonl and the method file. Which way beta helps is read from `beta.higher`:
"closer" (a higher one keeps the policy near the reference) or "stronger" (it strengthens the preference term).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_kit.run.history import latest, series
from dpo_kit.run.measures import FLOOR, KL_FLOOR, LOGRATIOS, kl_key
from dpo_kit.run.report.findings import Finding, find
from dpo_kit.run.rounding import in_rounding, learned, rounding_text

Rows = Sequence[Mapping[str, Any]]

FLAT_NOISE = 2.0  # standard errors that the loss must move to count as moving
CERTAIN = 0.99  # accuracy that no preference data of people's reaches
FAR_NATS = 10.0  # reverse or forward KL per answer; the default budget of a sweep's choice
FAR_PER_TOKEN = 0.6
UNFELT = 0.1  # saturation below which the loss is still nearly linear in the margin, so that beta only scales it


def diagnose(history: Rows, method: Mapping[str, Any]) -> list[Finding]:
    """The findings for a run, most telling first; `history`: rows of metrics.jsonl, `method`: its config block."""
    for stands_still in (lost_in_rounding, loss_flat):  # such a run has no more to say
        if finding := stands_still(history, method):
            return [finding]
    findings, values, measured = [], latest(history), {key for row in history for key in row}
    closer = "raise beta, which keeps the policy closer to the reference"
    hold_back = closer if method["beta"]["higher"] == "closer" else "lower beta, which weakens the preference term"
    hold_back += f" (this method's grid: {', '.join(f'{value:g}' for value in method['beta']['grid'])})"
    for way in ("reverse", "forward"):  # the KL per answer is large, and so per token or grown threefold at the end
        key = kl_key(way, measured)
        kl, per_token = _course(history, key), _course(history, f"{key}_per_token") or [0.0]
        if len(kl) < 3 or kl[-1] <= max(FAR_NATS, values.get(KL_FLOOR, 0.0)):
            continue
        if kl[-1] >= 3 * kl[len(kl) // 2] or per_token[-1] > FAR_PER_TOKEN:
            findings.append(find("drift explodes", nats=kl[-1], direction=way, hold_back=hold_back))
            break
    reward, low, high = (series(history, f"gold/reward{end}") for end in ("", "_low", "_high"))
    if len(reward) > 1 and learned(values):  # the gold reward ends beyond its interval below its best
        best, last = max(reward, key=reward.__getitem__), max(reward)
        if high.get(last, math.inf) < low.get(best, -math.inf):
            figures: dict[str, Any] = {"best": reward[best], "best_step": best, "last": reward[last]}
            findings.append(find("over-optimised", **figures, hold_back=hold_back))
    accuracy = {step: value for step, value in series(history, "probe/accuracy").items() if step > 0}
    first = min(accuracy, default=0)  # next to 1 there, or within a fifth of the run
    early = [value for step, value in accuracy.items() if step <= max(first, 0.2 * max(accuracy))]
    if early and max(early) >= CERTAIN:
        rule = _course(history, "probe/length_rule_accuracy")
        clue = f" (and taking the longer answer is right in {rule[-1]:.0%})" if rule and rule[-1] > 0.75 else ""
        findings.append(find("certain at once", accuracy=max(early), step=first, clue=clue))
    chosen, rejected = (_course(history, key) for key in LOGRATIOS.values())
    if min(len(chosen), len(rejected)) > 3 and learned(values):  # chosen has lost half of the margin, and falls on
        half, end, other = chosen[len(chosen) // 2], chosen[-1], rejected[-1]
        both = max(end, other) <= -max(1.0, values.get(FLOOR, 0.0)) and end <= -0.5 * (end - other)
        if both and half - end >= 0.25 * abs(end) and end <= chosen[-2]:
            findings.append(find("both fall", end=end, hold_back=hold_back))
    return [*findings, *filter(None, [beta_unfelt(history, method)])]


def lost_in_rounding(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """Held-out answers have moved no further than rounding alone moves one, and their margin shows nothing learned."""
    values = latest(history)
    if not in_rounding("probe/accuracy", values):
        return None
    return find("lost in rounding", rounding=rounding_text(values).capitalize())


def loss_flat(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """The loss stays within its noise, and held-out rows show nothing learned either."""
    losses = _course(history, "loss")
    part = len(losses) // 4
    if part < 2 or learned(latest(history)) is not False:
        return None
    first, last = losses[:part], losses[-part:]
    noise = math.sqrt(statistics.variance(first) / part + statistics.variance(last) / part)
    fell = statistics.fmean(first) - statistics.fmean(last) > FLAT_NOISE * noise + 1e-9
    return None if fell else find("flat loss", **method["learning_rate"])


def beta_unfelt(history: Rows, method: Mapping[str, Any]) -> Finding | None:
    """The loss does not saturate at the end, so that neighbouring betas would give nearly the same run."""
    saturation = _course(history, "probe/saturation")
    if len(saturation) < 2 or saturation[-1] >= UNFELT or in_rounding("probe/saturation", latest(history)):
        return None
    return find("beta unfelt", saturation=saturation[-1])


def needs_longer(history: Rows, method: Mapping[str, Any]) -> bool:
    """Whether beta is not felt yet, or nothing learned."""
    return any(check(history, method) for check in (beta_unfelt, loss_flat, lost_in_rounding))


def _course(history: Rows, key: str) -> list[float]:
    return list(series(history, key).values())
