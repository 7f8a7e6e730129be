"""Which run of a sweep to take, by a rule stated before the numbers are known; a pure function of run records.

Eligible runs beat the reference within a KL budget and without losing capability. Those that a paired test does not
separate from the best tie with it, and of these the one nearest to the reference wins.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from dpo_kit.config.settings import Choose
from dpo_kit.run.files import texts
from dpo_kit.run.measures import win_rate_key
from dpo_kit.run.report.diagnosis import UNFELT
from dpo_kit.run.rounding import rounding_text
from dpo_kit.run.statistics import Difference, from_intervals, holm
from dpo_kit.sweep.choice.quality import Interval, Quality, quality_of, read_interval
from dpo_kit.sweep.choice.runs import RunRecord, number, swept_keys

LEVEL = 0.05
SLACK = 1e-9  # .90 − .87 is a little above .03 in floating point
CUT = 0.05  # share of answers at the token limit from which a KL is called a lower bound


def say(name: str, /, **values: Any) -> str:
    """The sentence `name` of rule.yaml."""
    return texts(__file__)[name].format(**values)


@dataclass
class Verdict:
    """What the rule says of one finished run. `why_not` is empty where it is eligible; `against_best` has Holm's p."""

    run: RunRecord
    quality: Interval | None
    gain: Difference | None
    capability_loss: float | None
    lost_by_chance: bool  # more capability than is allowed, but no more than chance explains
    why_not: tuple[str, ...]
    against_best: Difference | None = None
    tied: bool = False

    @property
    def value(self) -> float:
        return self.quality[0] if self.quality else float("-inf")

    @property
    def kl(self) -> float:
        """What the run is ranked by: below what rounding alone makes, one KL is as good as another."""
        return max(self.run.kl_reverse, self.run.kl_floor) if self.run.kl_reverse is not None else float("inf")


@dataclass(frozen=True)
class Choice:
    """The recommended run (None where no run is eligible), why, and all that it rests on; best.json's content."""

    recommended: RunRecord | None
    quality: Quality
    limits: Choose
    reason: str
    needed: int | None
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    means: tuple[dict[str, Any], ...] = ()
    within: tuple[tuple[str, "Choice"], ...] = ()

    @property
    def rule(self) -> str:
        """The rule in words, with its limits."""
        limits = {"budget": self.limits.kl_budget_nats, "regression": self.limits.max_regression, "level": LEVEL}
        return say("rule", quality=self.quality.name, test=self.quality.test, **limits)

    def to_json(self) -> dict[str, Any]:
        """The content of best.json: nats per answer for KL, the measure's own unit for quality."""
        evidence = [self._evidence(verdict) for verdict in self.verdicts]
        content = {
            "recommended": self.recommended.path if self.recommended else None,
            "step": self.recommended.step if self.recommended else None, "rule": self.rule,
            "evidence": evidence, "reason": self.reason, "provisional": self.quality.provisional,
            "needed": self.needed, "needed_unit": self.quality.unit, "quality": self.quality.name,
            **self.limits.model_dump(), "notes": list(self.notes), "means_over_seeds": list(self.means),
        }  # fmt: skip
        return content | ({"within": {name: inner.to_json() for name, inner in self.within}} if self.within else {})

    def _evidence(self, verdict: Verdict) -> dict[str, Any]:
        run, (value, low, high) = verdict.run, verdict.quality or (None, None, None)
        rounding = [key for key in run.measured if run.in_rounding(key)]
        row: dict[str, Any] = {
            "run": run.path, "step": run.step, "method": run.method, "beta": run.beta, "seed": run.seed,
            "quality": value, "quality_low": low, "quality_high": high, "gain": _difference(verdict.gain),
            "kl_reverse_nats": run.kl_reverse, "rounding": rounding, "capability_loss": verdict.capability_loss,
            "eligible": not verdict.why_not, "why_not": list(verdict.why_not),
            "below_best": _difference(verdict.against_best), "tied_with_best": verdict.tied,
        }  # fmt: skip
        if cited := {key: run.judged[key] for key in CITED if key in run.judged}:
            file = run.evaluation.relative_to(run.root) / "result.json"
            row["evaluation"] = {"file": f"{run.path}/{file.as_posix()}", **cited}
        if run is self.recommended and run.test:
            row["test"] = {key: number(item) for key, item in run.test.items()}
        return row


CITED = (
    "parts", "split", "opponent", "judge", "win_rate", "win_rate_low", "win_rate_high", "win_rate_prompts",
    "win_rate_corrected", "win_rate_corrected_low", "win_rate_corrected_high", "reviewed", "gate",
    "held_out_rows", "accuracy", "accuracy_low", "accuracy_high",
)  # fmt: skip


def _difference(test: Difference | None) -> dict[str, Any] | None:
    if test is None:
        return None
    content = {key: getattr(test, key) for key in ("value", "low", "high", "p", "basis")}
    return content | ({"count": test.count} if test.count else {})


def choose(runs: Sequence[RunRecord], **given: float | None) -> Choice:
    """Apply the rule to `runs`; those that have not finished well are passed over. KL budget and largest loss of
    capability: as `given`, else as the run started last says, else the defaults.
    """
    manifests = (run.manifest for run in runs)
    latest: Mapping[str, Any] = max(manifests, key=lambda manifest: str(manifest.get("started") or ""), default={})
    limits = Choose(**(latest.get("choose") or {}) | {key: value for key, value in given.items() if value is not None})
    finished = [run for run in runs if run.finished]
    models = by_model(finished)
    if len(models) < 2:
        choice = _choose_within(finished, limits)
    else:
        names = [group[0].start_name for group in models]
        if len(set(names)) < len(names):  # two folders of one name
            names = [f"{name} (model {place})" for place, name in enumerate(names, start=1)]
        within = [(name, _choose_within(group, limits)) for name, group in zip(names, models, strict=True)]
        alone = [f"from {name}, {inner.recommended.name}" for name, inner in within if inner.recommended]
        reason = say("different models", count=len(models), names=", ".join(names))
        reason += say("within models", alone="; ".join(alone)) if alone else ""
        choice = Choice(None, quality_of(finished), limits, reason, None, within=tuple(within))
    return replace(choice, notes=tuple(_notes(runs, finished, choice)), means=_means(finished, choice.quality))


def by_model(runs: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """The runs of each step-0 model, whose KLs compare."""
    models: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        models.setdefault(run.start_model, []).append(run)
    return list(models.values())


def _choose_within(runs: Sequence[RunRecord], limits: Choose) -> Choice:
    """The choice among finished runs of one step-0 model, and what was kept on their way: why, and the number that
    would settle what is not settled.
    """
    quality = quality_of(runs)
    arms = [arm for run in runs for arm in run.way() if arm.step is None or quality.read(arm)]
    verdicts = [judge(arm, quality, limits) for arm in arms]
    chosen, needed, unit = None, None, quality.unit
    if eligible := [verdict for verdict in verdicts if not verdict.why_not]:
        best = max(eligible, key=lambda verdict: verdict.value)
        rivals = [verdict for verdict in eligible if verdict is not best]
        tests = [quality.compare(best.run, verdict.run) for verdict in rivals]
        adjusted = iter(holm([test.p for test in tests if test]))
        for verdict, test in zip(rivals, tests, strict=True):
            verdict.against_best = test and replace(test, p=next(adjusted))
            verdict.tied = not (verdict.against_best and verdict.against_best.p < LEVEL)
        best.tied = True
        tied = [verdict for verdict in eligible if verdict.tied]
        winner = min(tied, key=lambda verdict: (verdict.kl, -verdict.value, verdict.run.name))
        chosen = winner.run
        drift = f"a reverse KL of {winner.kl:.2f} nats"
        if chosen.in_rounding(chosen.kl_reverse_key):
            drift = f"a reverse KL below the {winner.kl:.2g} nats that rounding alone makes"
        at = f"{quality.name} {_shown(winner.quality)} at {drift}"
        if len(tied) == 1:
            how = f"beats the other {len(rivals)} eligible beyond chance" if rivals else "is the only eligible run"
            reason = f"{chosen.name} {how}: {at}."
        else:
            reason = say("cannot be told apart", count=len(tied), quality=quality.name, run=chosen.name, at=at)
            needed = winner.against_best.needed if winner.against_best else None
            shown = {"run": best.run.name, "shown": _shown(best.quality), "needed": needed, "unit": unit}
            reason += say("to tell it", **shown) if needed else ""
    elif verdicts:
        faults = "; ".join(f"{verdict.run.name}: {', '.join(verdict.why_not)}" for verdict in verdicts)
        reason = f"No run is eligible. {faults}."
        close = [v for v in verdicts if len(v.why_not) == 1 and not v.run.in_rounding(quality.key)]
        ahead = [(v.gain, v.run) for v in close if v.gain and v.gain.low <= 0 < v.gain.value]
        gain, run = min(ahead, key=lambda pair: pair[0].needed or float("inf"), default=(None, None))
        if gain and run and (needed := gain.needed):
            reason += say("too few", run=run.name, gain=gain.value, needed=needed, unit=unit)
    else:
        reason = "No run has ended well so far."
    return Choice(chosen, quality, limits, reason, needed, tuple(verdicts))


def judge(run: RunRecord, quality: Quality, limits: Choose) -> Verdict:
    """Whether one finished run is eligible, and if not, each reason why."""
    reached, gain, faults = quality.read(run), quality.gain(run), []
    if reached is None or gain is None:
        faults.append(f"the {quality.name} was not measured")
    elif run.in_rounding(quality.key):
        faults.append(f"the {quality.name} is rounding ({rounding_text(run.measured)})")
    elif gain.low <= 0:
        difference = f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
        faults.append(f"the {quality.name} does not beat the reference (difference {difference})")
    kl = run.kl_reverse
    if kl is None:
        faults.append("the reverse KL was not measured (callbacks.kl_drift=true does)")
    elif kl > limits.kl_budget_nats:
        faults.append(f"reverse KL {kl:.1f} nats is over the budget of {limits.kl_budget_nats:g}")
    start, final = number(run.at_start.get("gold/capability")), run.measured.get("gold/capability")
    loss = None if start is None or final is None else start - final
    by_chance = False
    if loss is not None and loss > limits.max_regression + SLACK:
        before, after = (read_interval(of, "gold/capability") for of in (run.at_start, run.measured))
        by_chance = bool(before and after and from_intervals(before, after).low <= 0)
        if not by_chance:
            faults.append(f"capability fell by {loss:.3f}, more than {limits.max_regression:g}")
    gate = run.judged.get("gate")
    if gate is None and run.end_is_gated:
        faults.append("no regression gate was run on it")
    if isinstance(gate, Mapping) and not gate.get("passed", True):
        value, low, high, limit = (number(gate.get(key)) for key in ("difference", "low", "high", "limit"))
        text = f"the regression gate failed on {gate.get('worst_task', 'a benchmark')}"
        text += f": difference to the reference {value:+.3f}" if value is not None else ""
        text += f" [{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else ""
        faults.append(text + (f", where at most {limit:g} may be lost" if limit is not None else ""))
    return Verdict(run, reached, gain, loss, by_chance, tuple(faults))


def _shown(interval: Interval | None) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval) if interval else "not measured"


def _notes(runs: Sequence[RunRecord], finished: Sequence[RunRecord], choice: Choice) -> Iterator[str]:
    """What a reader must know beside the choice, a sentence each."""
    quality, best = choice.quality, choice.recommended
    if states := [run.status for run in runs if not run.finished]:
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        yield say("unfinished", finished=len(finished), all=len(runs), counts=counts)
    if finished and quality.provisional:
        yield say("provisional", quality=quality.name)
    if len(finished) > 1:
        yield say("one seed" if len({run.seed for run in finished}) == 1 else "seeds")
    if lost := ", ".join(run.path for run in finished if run.in_rounding("probe/accuracy")):
        yield say("answers in rounding", runs=lost)
    if near := ", ".join(run.path for run in finished if run.in_rounding(run.kl_reverse_key)):
        yield say("drift in rounding", runs=near)
    if evaluated := [run for run in finished if run.is_evaluated]:
        rows = sorted({run.held_out_rows for run in evaluated})
        took = f"{rows[0]:,}" + (f" to {rows[-1]:,}" if len(rows) > 1 else "")
        yield say("evaluated", evaluated=len(evaluated), finished=len(finished), took=took)
    if best and best.step is not None:
        yield say("on the way", run=best.path, step=best.step)
    yield from _falls(choice)
    if unsure := [verdict for verdict in choice.verdicts if verdict.lost_by_chance]:
        fell = ", ".join(f"{verdict.run.name} {verdict.capability_loss:.3f}" for verdict in unsure)
        asked = {f"{count:g}" for verdict in unsure if (count := verdict.run.measured.get("gold/capability_prompts"))}
        yield say("capability unsure", fell=fell, asked=" or ".join(sorted(asked)) or "so few")
    if (saturation := unfelt_saturation(finished)) is not None:
        yield say("under-trained", saturation=saturation)
    if len({((run.manifest.get("data") or {}).get("select") or {}).get("sha256") for run in finished}) > 1:
        yield say("different data")
    tests = [test for verdict in choice.verdicts for test in (verdict.gain, verdict.against_best) if test]
    corrected = {win_rate_key(verdict.run.judged) for verdict in choice.verdicts if verdict.quality} - {"win_rate"}
    if any(test.basis == "their intervals alone" for test in tests) and not corrected:
        yield say("no answers")
    if quality.key == "win_rate":
        judged = [verdict.run for verdict in choice.verdicts if verdict.quality]
        if len({run.judged_by for run in judged}) > 1:
            yield say("different judges")
        if len({win_rate_key(run.judged) for run in judged}) > 1:
            yield say("corrected in part")
        judges = [verdict.run.judged.get("judge") or {} for verdict in choice.verdicts]
        if failed := {name for judge in judges for name in judge.get("controls_failed") or []}:
            yield say("controls failed", controls=", ".join(sorted(failed)))
        if "test" in {run.judged.get("split") for run in judged}:
            yield say("test split")
    share = best.measured.get(f"{best.kl_reverse_key}_cut_share") if best else None
    if share is not None and share > CUT:
        yield say("cut answers", share=share)


def _falls(choice: Choice) -> Iterator[str]:
    """Runs that were better before their end, beyond chance: since which step, and by how much."""
    for run in (verdict.run for verdict in choice.verdicts if verdict.run.step is None):
        way = [verdict for verdict in choice.verdicts if verdict.run.path == run.path and verdict.quality]
        peak = max(way, key=lambda verdict: verdict.value, default=None)
        fall = choice.quality.compare(peak.run, run) if peak and peak.run.step is not None else None
        # the highest of several is high by chance too: Bonferroni
        if peak and fall and fall.low > 0 and fall.p * (len(way) - 1) < LEVEL:
            shown = {"run": run.path, "step": peak.run.step, "quality": choice.quality.name}
            yield say("falls", **shown, fall=fall.value, low=fall.low, high=fall.high)


def unfelt_saturation(runs: Sequence[RunRecord]) -> float | None:
    """The highest saturation (of 1) where even that is too low for beta to be felt; None where felt or not known."""
    telling = [run for run in runs if not run.in_rounding("probe/saturation")]
    known = [value for run in telling if (value := run.measured.get("probe/saturation")) is not None]
    return max(known) if known and max(known) < UNFELT else None


def _means(finished: Sequence[RunRecord], quality: Quality) -> tuple[dict[str, Any], ...]:
    """Mean quality and KL over the seeds of each method, beta and further swept value, where there are several."""
    extra = swept_keys(finished)
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run in finished:
        key = (run.method, run.beta, *(str(values.get(run.path)) for values in extra.values()))
        groups.setdefault(key, []).append(run)
    if all(len({run.seed for run in group}) < 2 for group in groups.values()):
        return ()
    rounded = any(run.kl_floor for run in finished)
    means = []
    for key, group in groups.items():
        values = [interval[0] for run in group if (interval := quality.read(run))]
        kls = [run.kl_reverse for run in group if run.kl_reverse is not None]
        mean = dict(zip(("method", "beta", *extra), key, strict=True)) | {"seeds": len(group)}
        mean["quality"] = fmean(values) if values else None
        mean["quality_sd_over_seeds"] = stdev(values) if len(values) > 1 else None
        mean["kl_reverse_nats"] = fmean(kls) if kls else None
        means.append(mean | ({"kl_floor_nats": max(run.kl_floor for run in group)} if rounded else {}))
    return tuple(means)
