"""Which run of a sweep to take, by a rule stated before the numbers are known; a pure function of run records.

Eligible runs beat the reference within a KL budget and without losing capability. Those that a paired test does not
separate from the best tie with it, and of these the one nearest to the reference wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from dpo_kit.config.settings import Choose
from dpo_kit.run.report.diagnosis import UNFELT
from dpo_kit.run.statistics import Difference, holm
from dpo_kit.sweep.choice.quality import Interval, Quality, quality_of
from dpo_kit.sweep.choice.runs import RunRecord, number, swept_keys

LEVEL = 0.05
SLACK = 1e-9  # .90 − .87 is a little above .03 in floating point
CUT = 0.05  # share of answers at the token limit from which a KL is called a lower bound


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one finished run. `why_not` is empty where it is eligible; `against_best` has Holm's p."""

    run: RunRecord
    quality: Interval | None
    gain: Difference | None
    capability_loss: float | None
    why_not: tuple[str, ...]
    against_best: Difference | None = None
    tied: bool = False

    @property
    def value(self) -> float:
        return self.quality[0] if self.quality else float("-inf")

    @property
    def kl(self) -> float:
        return self.run.kl_reverse if self.run.kl_reverse is not None else float("inf")


@dataclass(frozen=True)
class Choice:
    """The recommended run (None where no run is eligible), why, and all that it rests on; best.json's content."""

    recommended: RunRecord | None
    quality: Quality
    limits: Choose
    rule: str
    reason: str
    needed: int | None
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    means: tuple[dict[str, Any], ...] = ()
    within: tuple[tuple[str, Choice], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The content of best.json: nats per answer for KL, the measure's own unit for quality."""
        found = {
            "recommended": self.recommended.path if self.recommended else None,
            "rule": self.rule,
            "evidence": [_evidence(verdict, self) for verdict in self.verdicts],
            "reason": self.reason,
            "provisional": self.quality.provisional,
            "needed": self.needed,
            "needed_unit": self.quality.unit,
            "quality": self.quality.name,
            **self.limits.model_dump(),
            "notes": list(self.notes),
            "means_over_seeds": list(self.means),
        }
        return found | ({"within": {name: each.to_json() for name, each in self.within}} if self.within else {})


def read_limits(runs: Sequence[RunRecord], **given: float | None) -> Choose:
    """KL budget and largest loss of capability: as given, else as the run started last says, else the defaults."""
    latest = max((run.manifest for run in runs), key=lambda manifest: str(manifest.get("started") or ""), default={})
    return Choose(**{**(latest.get("choose") or {}), **{key: v for key, v in given.items() if v is not None}})


def choose(runs: Sequence[RunRecord], limits: Choose) -> Choice:
    """Apply the rule to `runs`. Those that have not finished well are passed over."""
    finished = [run for run in runs if run.finished]
    models: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in finished:
        models.setdefault(run.start_model, []).append(run)
    choice = _choose_within(finished, limits) if len(models) < 2 else _choose_nothing(models, limits)
    return replace(
        choice, notes=(*choice.notes, *_notes(runs, finished, choice)), means=_means(finished, choice.quality)
    )


def _choose_nothing(models: dict[tuple[str, ...], list[RunRecord]], limits: Choose) -> Choice:
    quality = quality_of([run for group in models.values() for run in group])
    names = {key: group[0].start_name for key, group in models.items()}
    if len(set(names.values())) < len(names):  # two folders of one name
        names = {key: f"{name} (model {place})" for place, (key, name) in enumerate(names.items(), start=1)}
    within = tuple((names[key], _choose_within(group, limits)) for key, group in models.items())
    alone = [f"from {name}, {each.recommended.path}" for name, each in within if each.recommended]
    reason = (
        f"The runs start from {len(models)} different models ({', '.join(names.values())}), and a KL to one reference "
        "never compares with a KL to another: nothing is chosen across them."
    )
    reason += f" Within one model: {'; '.join(alone)}." if alone else ""
    return Choice(None, quality, limits, rule_text(quality, limits), reason, None, within=within)


def rule_text(quality: Quality, limits: Choose) -> str:
    """The rule in words, with its limits."""
    return (
        f"Quality is the {quality.name}. Eligible: its 95 % interval beats the reference, reverse KL at most "
        f"{limits.kl_budget_nats:g} nats per answer, capability loss at most {limits.max_regression:g}, no regression "
        "gate failed. Eligible runs "
        f"that a paired test by prompt ({quality.test}, Holm at {LEVEL}) does not separate from the best tie with it; "
        "among them the lowest reverse KL wins."
    )


def _choose_within(runs: Sequence[RunRecord], limits: Choose) -> Choice:
    quality = quality_of(runs)
    verdicts = _compare_with_best([judge(run, quality, limits) for run in runs], quality)
    tied = [verdict for verdict in verdicts if verdict.tied]
    winner = min(tied, key=lambda verdict: (verdict.kl, -verdict.value, verdict.run.path)) if tied else None
    reason, needed = _say_why(winner, tied, verdicts, quality) if winner else _say_why_none(verdicts, quality)
    return Choice(
        winner.run if winner else None, quality, limits, rule_text(quality, limits), reason, needed, tuple(verdicts)
    )


def judge(run: RunRecord, quality: Quality, limits: Choose) -> Verdict:
    """Whether one finished run is eligible, and if not, each reason why."""
    found, gain, loss = quality.read(run), quality.gain(run), capability_loss(run)
    faults = [
        _quality_fault(found, gain, quality),
        _kl_fault(run.kl_reverse, limits.kl_budget_nats),
        f"capability fell by {loss:.3f}, more than {limits.max_regression:g}"
        if loss is not None and loss > limits.max_regression + SLACK
        else None,
        gate_fault(run),
    ]
    return Verdict(run, found, gain, loss, tuple(fault for fault in faults if fault))


def capability_loss(run: RunRecord) -> float | None:
    """Share of the capability lost since step 0 (negative: gained); None where it is not known."""
    start, final = run.start("gold/capability"), run.final("gold/capability")
    return None if start is None or final is None else start - final


def gate_fault(run: RunRecord) -> str | None:
    """Why the regression gate of evaluation/result.json refuses the run; None where it passed or was not run."""
    gate = run.judged.get("gate")
    if not isinstance(gate, Mapping) or gate.get("passed", True):
        return None
    value, low, high, limit = (number(gate.get(key)) for key in ("difference", "low", "high", "limit"))
    text = f"the regression gate failed on {gate.get('worst_task', 'a benchmark')}"
    text += f": difference to the reference {value:+.3f}" if value is not None else ""
    text += f" [{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else ""
    return text + (f", where at most {limit:g} may be lost" if limit is not None else "")


def _quality_fault(found: Interval | None, gain: Difference | None, quality: Quality) -> str | None:
    if found is None or gain is None:
        return f"the {quality.name} was not measured"
    if gain.low > 0:
        return None
    seen = f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
    return f"the {quality.name} does not beat the reference (difference {seen})"


def _kl_fault(kl: float | None, budget: float) -> str | None:
    if kl is None:
        return "the reverse KL was not measured (callbacks.kl_drift=true does)"
    return f"reverse KL {kl:.1f} nats is over the budget of {budget:g}" if kl > budget else None


def _compare_with_best(verdicts: list[Verdict], quality: Quality) -> list[Verdict]:
    """Test each eligible run against the one of highest quality; those not separated (Holm) tie with it."""
    eligible = [verdict for verdict in verdicts if not verdict.why_not]
    if not eligible:
        return verdicts
    best = max(eligible, key=lambda verdict: verdict.value)
    tests = {v.run.path: quality.compare(best.run, v.run) for v in eligible if v is not best}
    made = {path: test for path, test in tests.items() if test is not None}
    adjusted = dict(zip(made, holm([test.p for test in made.values()]), strict=True))

    def mark(verdict: Verdict) -> Verdict:
        path = verdict.run.path
        test = replace(made[path], p=adjusted[path]) if path in made else None
        tied = verdict is best or (path in tests and adjusted.get(path, 1.0) >= LEVEL)
        return replace(verdict, against_best=test, tied=tied)

    return [mark(verdict) for verdict in verdicts]


def _say_why(
    winner: Verdict, tied: Sequence[Verdict], verdicts: Sequence[Verdict], quality: Quality
) -> tuple[str, int | None]:
    best = max(tied, key=lambda verdict: verdict.value)
    eligible = sum(not verdict.why_not for verdict in verdicts)
    at = f"{quality.name} {_shown(winner.quality)} at a reverse KL of {winner.kl:.2f} nats"
    if len(tied) == 1:
        how = "is the only eligible run" if eligible == 1 else f"beats the other {eligible - 1} eligible beyond chance"
        return f"{winner.run.path} {how}: {at}.", None
    text = (
        f"{len(tied)} eligible runs cannot be told apart by {quality.name}; of these {winner.run.path} stays nearest "
        f"to the reference: {at}."
    )
    needed = winner.against_best.needed if winner.against_best and winner is not best else None
    if needed:
        text += (
            f" To tell it from the highest, {best.run.path} ({_shown(best.quality)}), would take about {needed:,} "
            f"{quality.unit} if the difference is what it seems."
        )
    return text, needed


def _say_why_none(verdicts: Sequence[Verdict], quality: Quality) -> tuple[str, int | None]:
    if not verdicts:
        return "No run has ended well so far.", None
    faults = "; ".join(f"{verdict.run.path}: {', '.join(verdict.why_not)}" for verdict in verdicts)
    short = [v for v in verdicts if len(v.why_not) == 1 and v.gain and v.gain.low <= 0 < v.gain.value]
    nearest = min(short, key=lambda v: v.gain.needed or float("inf") if v.gain else 0.0, default=None)
    needed = nearest.gain.needed if nearest and nearest.gain else None
    text = f"No run is eligible. {faults}."
    if nearest and nearest.gain and needed:
        text += (
            f" The data are too few to tell: a gain such as that of {nearest.run.path} ({nearest.gain.value:+.3f}) "
            f"would take about {needed:,} {quality.unit}."
        )
    return text, needed


def _shown(interval: Interval | None) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval) if interval else "not measured"


def _notes(runs: Sequence[RunRecord], finished: Sequence[RunRecord], choice: Choice) -> list[str]:
    """What a reader must know beside the choice, a sentence each."""
    checks = (
        _note_unfinished(runs, finished),
        _note_provisional(choice.quality) if finished else None,
        _note_seeds(finished),
        _note_saturation(finished),
        _note_data(finished),
        _note_unpaired(choice),
        _note_judges(choice),
        _note_controls(choice),
        _note_split(choice),
        _note_cut(choice.recommended),
    )
    return [note for note in checks if note]


def _note_provisional(quality: Quality) -> str | None:
    if not quality.provisional:
        return None
    return f"Provisional: {quality.name} alone can prefer the weaker policy (arXiv:2405.19534); judge fresh samples."


def _note_unfinished(runs: Sequence[RunRecord], finished: Sequence[RunRecord]) -> str | None:
    states = [run.status for run in runs if not run.finished]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(finished)} of {len(runs)} runs count here ({counts})." if states else None


def _note_seeds(finished: Sequence[RunRecord]) -> str | None:
    if len(finished) < 2:
        return None
    if len({run.seed for run in finished}) == 1:
        return "One seed: this ranks runs, not betas; another seed may order them differently."
    return "Means over seeds stand beside the choice: they rank betas, the rule chooses a run."


def _note_saturation(finished: Sequence[RunRecord]) -> str | None:
    known = [value for run in finished if (value := run.final("probe/saturation")) is not None]
    if not known or max(known) >= UNFELT:
        return None
    return (
        f"Under-trained: beta not identified. Nothing saturates (at most {max(known):.2f} of 1), so that runs of "
        "different beta differ by chance: train longer before reading an order into them."
    )


def _note_data(finished: Sequence[RunRecord]) -> str | None:
    held_out = {((run.manifest.get("data") or {}).get("select") or {}).get("sha256") for run in finished}
    if len(held_out) < 2:
        return None
    return "The runs were measured on different held-out data: compare their values with care."


def _note_unpaired(choice: Choice) -> str | None:
    tests = [test for v in choice.verdicts for test in (v.gain, v.against_best) if test]
    unpaired = any(test.basis == "their intervals alone" for test in tests)
    return "Some runs have no answers by prompt: these were compared by their intervals alone." if unpaired else None


def _note_judges(choice: Choice) -> str | None:
    judged = {verdict.run.judged_by for verdict in choice.verdicts if verdict.quality}
    if choice.quality.key != "win_rate" or len(judged) < 2:
        return None
    return "The win rates come from different judges or opponents and are not compared: evaluate the sweep as a whole."


def _note_controls(choice: Choice) -> str | None:
    judges = [verdict.run.judged.get("judge") or {} for verdict in choice.verdicts]
    failed = {name for judge in judges for name in judge.get("controls_failed") or []}
    if choice.quality.key != "win_rate" or not failed:
        return None
    return f"The judge failed its own controls ({', '.join(sorted(failed))}): do not trust the win rates."


def _note_split(choice: Choice) -> str | None:
    splits = {verdict.run.judged.get("split") for verdict in choice.verdicts if verdict.quality}
    if choice.quality.key != "win_rate" or "test" not in splits:
        return None
    return "Win rates of the test split play a part in this choice: the winner has no untouched data left to report on."


def _note_cut(run: RunRecord | None) -> str | None:
    share = run.final(f"{run.kl_reverse_key}_cut_share") if run else None
    if share is None or share <= CUT:
        return None
    return f"{share:.0%} of the recommended run's answers reached callbacks.max_new_tokens: its KL is a lower bound."


def _means(finished: Sequence[RunRecord], quality: Quality) -> tuple[dict[str, Any], ...]:
    """Mean quality and KL over the seeds of each method, beta and further swept value, where there are several."""
    extra = swept_keys(finished)
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run in finished:
        key = (run.method, run.beta, *(str(values.get(run.path)) for values in extra.values()))
        groups.setdefault(key, []).append(run)
    if all(len({run.seed for run in group}) < 2 for group in groups.values()):
        return ()
    return tuple(_mean(group, quality, dict(zip(extra, key[2:], strict=True))) for key, group in groups.items())


def _mean(group: Sequence[RunRecord], quality: Quality, extra: dict[str, Any]) -> dict[str, Any]:
    values = [found[0] for run in group if (found := quality.read(run))]
    kls = [run.kl_reverse for run in group if run.kl_reverse is not None]
    return {
        "method": group[0].method,
        "beta": group[0].beta,
        **extra,
        "seeds": len(group),
        "quality": fmean(values) if values else None,
        "quality_sd_over_seeds": stdev(values) if len(values) > 1 else None,
        "kl_reverse_nats": fmean(kls) if kls else None,
    }


def _evidence(verdict: Verdict, choice: Choice) -> dict[str, Any]:
    run, value = verdict.run, verdict.quality or (None, None, None)
    row = {
        "run": run.path,
        "method": run.method,
        "beta": run.beta,
        "seed": run.seed,
        "quality": value[0],
        "quality_low": value[1],
        "quality_high": value[2],
        "gain": _difference(verdict.gain),
        "kl_reverse_nats": run.kl_reverse,
        "capability_loss": verdict.capability_loss,
        "eligible": not verdict.why_not,
        "why_not": list(verdict.why_not),
        "below_best": _difference(verdict.against_best),
        "tied_with_best": verdict.tied,
    }
    row |= {"evaluation": cited} if (cited := _cited(run)) else {}
    test = run.test if choice.recommended is run else None
    return row | ({"test": {key: number(item) for key, item in test.items()}} if test else {})


CITED = (
    "parts",
    "split",
    "opponent",
    "judge",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "win_rate_prompts",
    "gate",
)


def _cited(run: RunRecord) -> dict[str, Any]:
    """What the evaluation says that a choice may rest on, and where that stands; {} where there is none."""
    found = {key: run.judged[key] for key in CITED if key in run.judged}
    return {"file": f"{run.path}/evaluation/result.json", **found} if found else {}


def _difference(test: Difference | None) -> dict[str, Any] | None:
    if test is None:
        return None
    counted = {"count": test.count} if test.count else {}
    return {"value": test.value, "low": test.low, "high": test.high, "p": test.p, "basis": test.basis, **counted}
