"""The parts of an evaluation: how each is measured, what of it goes into result.json, and what a reader sees.

A further part is one entry of `PARTS`; its findings are kept in `<name>.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpo_kit.config.places import file_faults, judge_faults, rows_faults
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.evaluate.behaviour.failures import Failures
from dpo_kit.evaluate.behaviour.hacking import Hacking
from dpo_kit.evaluate.benchmarks.alpaca import AlpacaEval
from dpo_kit.evaluate.benchmarks.domain import DomainPart
from dpo_kit.evaluate.benchmarks.harness import Gate
from dpo_kit.evaluate.benchmarks.mt_bench import MTBenchPart
from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, Part, line
from dpo_kit.evaluate.picture import DOUBTS, SCORING
from dpo_kit.evaluate.win_rate.comparison import measure_win_rate
from dpo_kit.evaluate.win_rate.rates import CUT
from dpo_kit.run.measures import HELD_OUT, as_measured, in_rounding, rounding_text
from dpo_kit.run.report.numbers import labelled_rows, number_text

ENDS = ("", "_low", "_high")
WIN_RATES = {
    "win_rate": "win rate",
    "win_rate_without_ties": "… with ties dropped",
    "win_rate_length_controlled_without_difficulty": "… at equal length (instruction difficulty left out)",
}


class Preferences(Part):
    """The implicit reward on held-out rows (preferences.py), and with `against=` the paired difference from another."""

    def measure(self, job: Job) -> Found:
        from dpo_kit.evaluate.preferences import compare_preferences, describe_preferences, margins_by_pair

        kind, rows = job.held_out()
        if kind == "prompts":
            return {"status": "skipped", "reason": "the held-out rows are prompts without answers"}
        job.folder.mkdir(parents=True, exist_ok=True)
        scores, used = _score(job, job.policy, job.reference, rows, job.beta, job.folder / "preferences.jsonl")
        found = {
            "status": "done",
            "policy": job.policy.name,
            "reference": job.reference.name,
            "split": job.split,
            "beta": job.beta,
            **describe_preferences(scores, used, job.beta, job.method.saturation),
        }
        other = job.opponent
        if kind == "pairs" and isinstance(other, Candidate) and other != job.reference:
            reference = job.reference if other.tuned is None else other.start
            theirs = margins_by_pair(*_score(job, other, reference, rows, None))
            found["against"] = {"name": other.name, **compare_preferences(margins_by_pair(scores, used), theirs)}
        return found

    def headline(self, found: Found) -> Found:
        keys = (*HELD_OUT, "accuracy_length_corrected_logistic")
        rows = found.get("pairs", found.get("rows"))
        return {"held_out_rows": rows} | {key: found[key] for key in keys if key in found}

    def lines(self, found: Found) -> Iterator[Line]:
        count = f"{found['pairs']:,} pairs" if found["kind"] == "pairs" else f"{found['rows']:,} answers"
        yield f"held-out rows ({found['split']})", count, ""
        yield from labelled_rows(found, {"accuracy": "accuracy", "auc": "AUC"})
        yield from labelled_rows(found, {"margin_nats": "margin, nats"}, ".2f")
        yield from labelled_rows(
            found, {"accuracy_length_corrected_logistic": "accuracy at equal length (logistic fit)"}
        )
        if calibration := found.get("calibration"):
            yield "calibration error (ECE)", f"{calibration['ece']:.3f}", ""
        yield "chosen less likely than before", f"{found['displacement']:.0%}", ""
        if floor := found.get("floor_nats"):
            yield "rounding of an answer, nats", number_text(floor, ".3f"), ""
        for key, test in (found.get("against") or {}).items():
            if key != "name":
                label = f"{key.replace('_nats', ', nats')}, less that of {found['against']['name']}"
                yield line(label, test["difference"], test["low"], test["high"], "+.3f")

    def notes(self, found: Found) -> Iterator[str]:
        measured = as_measured(found)
        if in_rounding("probe/accuracy", measured):
            yield f"{rounding_text(measured).capitalize()}: what they say of preferences is rounding."


def _score(
    job: Job,
    policy: Candidate,
    reference: Candidate,
    rows: list[dict[str, Any]],
    beta: float | None,
    path: Path | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Scores of `policy` against `reference`, row by row also in the file `path`, and the rows that were scored."""
    from dpo_kit.model.other_reference import token_differences
    from dpo_kit.run.quiet import quiet_libraries
    from dpo_kit.trainer.held_out import Tuned, place, score_rows

    quiet_libraries()
    tuned_from_it = policy.tuned is not None and policy.model.path == reference.model.path
    if not tuned_from_it and (differing := token_differences(policy.tokenizer(), reference.tokenizer())):
        raise ModelError(
            f"{policy.name} and {reference.name} have other vocabularies ({'; '.join(differing)}), so that their "
            "log-probabilities would be those of other texts: compare answers instead, parts=[win_rate]"
        )
    tuned = Tuned(place(policy.load()), policy.tokenizer(), SimpleNamespace(**job.config["trl"]))
    return score_rows(tuned, rows, reference.load(), beta, path)


class WinRate(Part):
    """The policy's answers against the opponent's, before a judge."""

    def check(self, job: Job) -> None:
        wanted = job.options.win_rate
        faults = [*judge_faults(job.options.judge)]
        faults += rows_faults("win_rate.prompts", wanted.prompts) if wanted.prompts else []
        if isinstance(job.opponent, Path) and wanted.opponent_server is None:
            faults += file_faults("against", str(job.opponent))
        if faults:
            raise ConfigError("\n".join(faults))

    def measure(self, job: Job) -> Found:
        return measure_win_rate(job)

    def headline(self, found: Found) -> Found:
        failed = [control["name"] for control in found["controls"] if not control["passed"]]
        keys = [f"{key}{end}" for key in WIN_RATES for end in ENDS] + ["win_rate_verdict", "win_rate_needed_prompts"]
        judge = found["judge"] | {"controls_failed": failed}
        return {key: found[key] for key in keys} | {"win_rate_prompts": found["prompts"], "judge": judge}

    def lines(self, found: Found) -> Iterator[Line]:
        yield f"against {found['opponent']}", f"{found['prompts']:,} prompts", ""
        yield from labelled_rows(found, WIN_RATES)
        for key, label in DOUBTS.items():
            if found[key] is not None and found["judge"]["kind"] not in SCORING:
                yield f"judge: {label}", f"{found[key]:.0%}", ""
        if review := found.get("review"):
            same = "" if review["same_verdict"] is None else f", {review['same_verdict']:.0%} as the judge"
            yield "checked by people", f"{review['checked']}{same}", ""
        for side, spent in found["spend"].items():
            if spent.get("cost"):
                yield f"cost of {side}", f"{spent['cost']:.4g}", ""

    def warnings(self, found: Found) -> Iterator[str]:
        for control in found["controls"]:
            if not control["passed"]:
                points = "no verdict" if control["points"] is None else f"{control['points']:.2f}"
                yield (
                    f"JUDGE CONTROL FAILED: {control['name']}: {points}, expected {control['expected']}; "
                    "do not trust the win rate below"
                )

    def notes(self, found: Found) -> Iterator[str]:
        rate, needed = found["win_rate"], found["win_rate_needed_prompts"]
        if found["win_rate_verdict"] == "not separated":
            would = f"about {needed:,} prompts would tell a rate of {rate:.3f} from .5" if needed else "it is .5 itself"
            yield f"Not separated from {found['opponent']}: {would} ({found['prompts']:,} so far)."
        elif rate is not None:
            than = f"{found['win_rate_verdict']} than {found['opponent']}"
            yield f"{found['policy']} is {than} ({found['judge']['name']})."
        for side in ("policy", "opponent"):
            share = found[side + "_answers"]["cut_share"]
            if share and share > CUT:
                limit = f"win_rate.max_new_tokens={found['settings']['max_new_tokens']}"
                yield f"{share:.0%} of the {side}'s answers were cut at {limit} and judged as cut."
        if found["outcomes"]["unjudged"]:
            missing, asked = found["outcomes"]["unjudged"], found["comparisons"]
            yield f"{missing} of {asked} comparisons have no verdict; the rate is of the others."


PARTS: dict[str, Part] = {  # in the order in which they are measured: the last two read what win_rate wrote
    "preferences": Preferences(),
    "win_rate": WinRate(),
    "gate": Gate(),
    "alpaca_eval": AlpacaEval(),
    "mt_bench": MTBenchPart(),
    "domain": DomainPart(),
    "failures": Failures(),
    "hacking": Hacking(),
}
