"""The parts of an evaluation: how each is measured, what of it goes into result.json, and what a reader sees.

A further part is one entry of `PARTS`; its findings are kept in `<name>.json`.
"""

from __future__ import annotations

from collections.abc import Iterator

from dpo_kit.evaluate.behaviour.parts import FAILURES, HACKING
from dpo_kit.evaluate.benchmarks.parts import ALPACA_EVAL, DOMAIN, GATE, MT_BENCH
from dpo_kit.evaluate.held_pairs import measure_preferences
from dpo_kit.evaluate.part import Found, Line, Part, interval_line, interval_text, number_text
from dpo_kit.evaluate.picture import DOUBTS, SCORING
from dpo_kit.evaluate.win_rate.comparison import measure_win_rate
from dpo_kit.evaluate.win_rate.rates import CUT

# --- held-out preferences ----------------------------------------------------------------------------------------

PREFERENCES = ("accuracy", "auc", "margin_nats", "class_gap_nats")


def _preference_headline(found: Found) -> Found:
    ends = ("", "_low", "_high")
    return {f"{key}{end}": found[f"{key}{end}"] for key in PREFERENCES for end in ends if f"{key}{end}" in found} | {
        key: found[key] for key in ("accuracy_length_corrected_logistic", "displacement", "both_down") if key in found
    }


def _preference_lines(found: Found) -> Iterator[Line]:
    count = f"{found['pairs']:,} pairs" if found["kind"] == "pairs" else f"{found['rows']:,} answers"
    yield f"held-out rows ({found['split']})", count, ""
    yield from interval_line(found, "accuracy", "accuracy")
    yield from interval_line(found, "auc", "AUC")
    yield from interval_line(found, "margin_nats", "margin, nats", ".2f")
    yield from interval_line(found, "accuracy_length_corrected_logistic", "accuracy at equal length (logistic fit)")
    if calibration := found.get("calibration"):
        yield "calibration error (ECE)", f"{calibration['ece']:.3f}", ""
    yield "chosen less likely than before", f"{found['displacement']:.0%}", ""
    for key, test in (found.get("against") or {}).items():
        if key != "name":
            label = f"{key.replace('_nats', ', nats')}, less that of {found['against']['name']}"
            yield label, number_text(test["difference"], "+.3f"), interval_text(test["low"], test["high"], ".3f")


# --- win rate ----------------------------------------------------------------------------------------------------

WIN_RATES = {
    "win_rate": "win rate",
    "win_rate_without_ties": "… with ties dropped",
    "win_rate_length_controlled_without_difficulty": "… at equal length (instruction difficulty left out)",
}


def _win_rate_headline(found: Found) -> Found:
    ends = ("", "_low", "_high")
    named = {f"{key}{end}": found[f"{key}{end}"] for key in WIN_RATES for end in ends}
    failed = [control["name"] for control in found["controls"] if not control["passed"]]
    judge = found["judge"] | {"controls_failed": failed}
    verdict = {key: found[key] for key in ("win_rate_verdict", "win_rate_needed_prompts")}
    return named | verdict | {"win_rate_prompts": found["prompts"], "judge": judge}


def _win_rate_lines(found: Found) -> Iterator[Line]:
    yield f"against {found['opponent']}", f"{found['prompts']:,} prompts", ""
    for key, label in WIN_RATES.items():
        yield from interval_line(found, key, label)
    for key, label in DOUBTS.items():
        if found[key] is not None and found["judge"]["kind"] not in SCORING:
            yield f"judge: {label}", f"{found[key]:.0%}", ""
    if review := found.get("review"):
        same = "" if review["same_verdict"] is None else f", {review['same_verdict']:.0%} as the judge"
        yield "checked by people", f"{review['checked']}{same}", ""
    for side, spent in found["spend"].items():
        if spent.get("cost"):
            yield f"cost of {side}", f"{spent['cost']:.4g}", ""


def _win_rate_warnings(found: Found) -> Iterator[str]:
    for control in found["controls"]:
        if not control["passed"]:
            points = "no verdict" if control["points"] is None else f"{control['points']:.2f}"
            yield (
                f"JUDGE CONTROL FAILED: {control['name']}: {points}, expected {control['expected']}; "
                "do not trust the win rate below"
            )


def _win_rate_notes(found: Found) -> Iterator[str]:
    rate, needed = found["win_rate"], found["win_rate_needed_prompts"]
    if found["win_rate_verdict"] == "not separated":
        would = f"about {needed:,} prompts would tell a rate of {rate:.3f} from .5" if needed else "it is .5 itself"
        yield f"Not separated from {found['opponent']}: {would} ({found['prompts']:,} so far)."
    elif rate is not None:
        yield f"{found['policy']} is {found['win_rate_verdict']} than {found['opponent']} ({found['judge']['name']})."
    for side in ("policy", "opponent"):
        share = found[side + "_answers"]["cut_share"]
        if share and share > CUT:
            limit = found["settings"]["max_new_tokens"]
            yield f"{share:.0%} of the {side}'s answers were cut at win_rate.max_new_tokens={limit} and judged as cut."
    if found["outcomes"]["unjudged"]:
        missing, asked = found["outcomes"]["unjudged"], found["comparisons"]
        yield f"{missing} of {asked} comparisons have no verdict; the rate is of the others."


PARTS: dict[str, Part] = {  # in the order in which they are measured: the last two read what win_rate wrote
    "preferences": Part(measure_preferences, _preference_headline, _preference_lines),
    "win_rate": Part(
        measure_win_rate, _win_rate_headline, _win_rate_lines, _win_rate_warnings, _win_rate_notes
    ),
    "gate": GATE,
    "alpaca_eval": ALPACA_EVAL,
    "mt_bench": MT_BENCH,
    "domain": DOMAIN,
    "failures": FAILURES,
    "hacking": HACKING,
}  # fmt: skip
