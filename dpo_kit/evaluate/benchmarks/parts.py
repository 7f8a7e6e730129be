"""The benchmarks as parts of an evaluation: the regression gate, AlpacaEval, MT-Bench, a labelled file of one's own.

Each is run by the policy and by what it is compared with: the reference, or the model that `against` names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_kit.evaluate.benchmarks.alpaca import read_instructions, run_alpaca
from dpo_kit.evaluate.benchmarks.dialogue import Speaker, local_speaker
from dpo_kit.evaluate.benchmarks.domain import read_labelled, run_domain
from dpo_kit.evaluate.benchmarks.harness import check_harness, run_harness
from dpo_kit.evaluate.benchmarks.mt_bench import read_questions, run_mt_bench
from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, Part, interval_text, number_text
from dpo_kit.judge.answers import Asking
from dpo_kit.run.journal import Journal


def models_of(job: Job) -> tuple[Candidate, Candidate]:
    """The policy and what it is compared with, under names that files can have."""
    other = job.opponent if isinstance(job.opponent, Candidate) else job.reference
    names = _file_name(job.policy.name), "reference" if other == job.reference else _file_name(other.name)
    ours, theirs = names if names[0] != names[1] else ("policy", "other")
    return replace(job.policy, name=ours), replace(other, name=theirs)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w+-]+", "_", Path(name).name, flags=re.ASCII) or "policy"


@contextmanager
def _speakers(job: Job, max_new_tokens: int) -> Iterator[tuple[Speaker, Speaker]]:
    """Both models, ready to answer; what the other one says serves every job of a sweep."""
    policy, other = models_of(job)
    asking = Asking(max_new_tokens, job.options.win_rate.chunk, job.options.win_rate.seed)
    with (
        Journal(job.folder / "benchmark_answers.jsonl") as ours,
        Journal(job.shared / "opponent_benchmark_answers.jsonl") as theirs,
    ):
        yield local_speaker(policy, ours, asking), local_speaker(other, theirs, asking)


def _difference(found: Mapping[str, Any], form: str) -> Iterator[Line]:
    """The row of a Difference of policy and reference, where there is one."""
    if test := found["difference"]:
        yield "… less the reference's", number_text(test["value"], form), interval_text(test["low"], test["high"], form)


# --- the regression gate -----------------------------------------------------------------------------------------


def _measure_gate(job: Job) -> Found:
    assert job.options.gate is not None
    return {"status": "done", **run_harness(*models_of(job), job.options.gate, job.folder)}


def _check_gate(job: Job) -> None:
    assert job.options.gate is not None
    check_harness(job.options.gate)


def _gate_lines(found: Found) -> Iterator[Line]:
    yield f"regression gate (loss up to {found['gate']['limit']:g})", found["gate"]["verdict"], ""
    for task in found["tasks"]:
        label = f"{task['task']}, {task['metric']}, {task['n']:,} samples: {task['verdict']}"
        yield label, number_text(task["difference"], "+.3f"), interval_text(task["low"], task["high"], "+.3f")


def _gate_warnings(found: Found) -> Iterator[str]:
    if not found["gate"]["passed"]:
        yield f"REGRESSION GATE FAILED: {found['gate']['reason']}"


def _gate_notes(found: Found) -> Iterator[str]:
    if found["gate"]["passed"]:
        yield f"Gate {found['gate']['verdict']}: {found['gate']['reason']}."


GATE = Part(_measure_gate, lambda found: {"gate": found["gate"]}, _gate_lines, _gate_warnings, _gate_notes, _check_gate)


# --- AlpacaEval --------------------------------------------------------------------------------------------------


def _measure_alpaca(job: Job) -> Found:
    """Waiting until the policy's outputs are annotated."""
    assert job.options.alpaca_eval is not None
    with _speakers(job, job.options.alpaca_eval.max_new_tokens) as speakers:
        found = run_alpaca(*speakers, job.options.alpaca_eval, job.folder, job.shared)
        policy = found["models"][speakers[0].name]
    return {"status": "done" if policy["result"] else "waiting", "policy": policy["result"], **found}


def _check_alpaca(job: Job) -> None:
    assert job.options.alpaca_eval is not None
    read_instructions(job.options.alpaca_eval)


def _alpaca_headline(found: Found) -> Found:
    if not (result := found["policy"]):
        return {}
    rates = {"alpaca_eval_win_rate": result, "alpaca_eval_win_rate_length_controlled": result["length_controlled"]}
    return {
        f"{name}{end and '_'}{end}": rate.get(end or "win_rate")
        for name, rate in rates.items()
        for end in ("", "low", "high")
    }


def _alpaca_lines(found: Found) -> Iterator[Line]:
    if result := found["policy"]:
        interval = interval_text(result["low"], result["high"], ".3f")
        yield f"AlpacaEval against {result['baseline']}, {result['n']:,} prompts", f"{result['win_rate']:.3f}", interval
        controlled = result["length_controlled"]
        if controlled["win_rate"] is not None:
            interval = interval_text(controlled["low"], controlled["high"], ".3f")
            yield "… length-controlled", f"{controlled['win_rate']:.3f}", interval
        yield from _difference(found, "+.3f")


def _alpaca_notes(found: Found) -> Iterator[str]:
    for name, model in found["models"].items():
        if not model["result"]:
            yield f"AlpacaEval: the answers of {name} wait for their annotation: {model['command']}"


ALPACA_EVAL = Part(_measure_alpaca, _alpaca_headline, _alpaca_lines, notes=_alpaca_notes, check=_check_alpaca)


# --- MT-Bench ----------------------------------------------------------------------------------------------------


def _measure_mt_bench(job: Job) -> Found:
    assert job.options.mt_bench is not None
    with _speakers(job, job.options.mt_bench.max_new_tokens) as speakers:
        found = run_mt_bench(*speakers, job.options.mt_bench, job.folder, job.shared)
        return {"policy": found["models"][speakers[0].name], **found}


def _check_mt_bench(job: Job) -> None:
    assert job.options.mt_bench is not None
    read_questions(job.options.mt_bench)


def _mt_bench_headline(found: Found) -> Found:
    keys = {"": "mean", "_low": "low", "_high": "high", "_questions": "n"}
    return {f"mt_bench{end}": found["policy"][key] for end, key in keys.items()}


def _mt_bench_lines(found: Found) -> Iterator[Line]:
    grades = found["policy"]
    if grades["mean"] is not None:
        interval = interval_text(grades["low"], grades["high"], ".2f")
        yield f"MT-Bench, 1 to 10, {grades['n']:,} questions", f"{grades['mean']:.2f}", interval
    for category, own in grades["categories"].items():
        if own["mean"] is not None:
            yield f"… {category}", f"{own['mean']:.2f}", interval_text(own["low"], own["high"], ".2f")
    yield from _difference(found, "+.2f")


def _mt_bench_notes(found: Found) -> Iterator[str]:
    for key, what in (("unparsable", "cannot be read"), ("unjudged", "are missing")):
        if count := sum(each[key] for each in found["models"].values()):
            yield f"MT-Bench: {count} grades {what}; the means are of the others."
    if found["without_reference"]:
        yield f"MT-Bench: {found['without_reference']} questions were graded without a reference answer of theirs."


MT_BENCH = Part(_measure_mt_bench, _mt_bench_headline, _mt_bench_lines, notes=_mt_bench_notes, check=_check_mt_bench)


# --- a labelled file of one's own --------------------------------------------------------------------------------


def _measure_domain(job: Job) -> Found:
    assert job.options.domain is not None
    with _speakers(job, job.options.domain.max_new_tokens) as speakers:
        found = run_domain(*speakers, job.options.domain, job.folder)
        return {"status": "done", "unrecognised_of_policy": found["unrecognised"].get(speakers[0].name, 0), **found}


def _check_domain(job: Job) -> None:
    assert job.options.domain is not None
    read_labelled(job.options.domain)


def _domain_headline(found: Found) -> Found:
    """domain_accuracy, _low, _high (of the policy), _difference, _difference_low, _difference_high; so for each."""
    keys = {"": "policy", "_low": "policy_low", "_high": "policy_high", "_difference": "difference",
            "_difference_low": "low", "_difference_high": "high"}  # fmt: skip
    return {
        f"domain_{re.sub('[^a-z0-9]+', '_', each['metric'].lower()).strip('_')}{end}": each[key]
        for each in found["figures"]
        for end, key in keys.items()
    }


def _domain_lines(found: Found) -> Iterator[Line]:
    for each in found["figures"]:
        form = ".1f" if each["metric"] == "BLEU" else ".3f"
        interval = interval_text(each["policy_low"], each["policy_high"], form)
        yield f"{each['metric']}, {each['n']:,} rows of one's own", number_text(each["policy"], form), interval
        interval = interval_text(each["low"], each["high"], f"+{form}")
        yield "… less the reference's", number_text(each["difference"], f"+{form}"), interval


def _domain_notes(found: Found) -> Iterator[str]:
    if count := found["unrecognised_of_policy"]:
        of = f"{count} of {found['n']} answers"
        yield f"{of} name no label, or several, and count as wrong: read domain.jsonl, or set domain.pattern."


DOMAIN = Part(_measure_domain, _domain_headline, _domain_lines, notes=_domain_notes, check=_check_domain)
