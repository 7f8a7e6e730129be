"""The benchmarks as parts of an evaluation: the regression gate, AlpacaEval, MT-Bench, a labelled file of one's own.

Each is run by the policy and by what it is compared with: the reference, or the model that `against` names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dpo_kit.config.settings import LLMJudge
from dpo_kit.errors import ConfigError
from dpo_kit.evaluate.benchmarks.alpaca import read_instructions, run_alpaca
from dpo_kit.evaluate.benchmarks.dialogue import Speaker, local_speaker
from dpo_kit.evaluate.benchmarks.domain import read_labelled, run_domain
from dpo_kit.evaluate.benchmarks.harness import check_harness, run_harness
from dpo_kit.evaluate.benchmarks.mt_bench import read_questions, run_mt_bench
from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, Part, line
from dpo_kit.judge.answers import Asking
from dpo_kit.run.journal import Journal

Options = TypeVar("Options")


def asked(options: Options | None) -> Options:
    """The options of a part that was asked for, which are there."""
    assert options is not None
    return options


def models_of(job: Job) -> tuple[Candidate, Candidate]:
    """The policy and what it is compared with, under names that files can have."""
    other = job.opponent if isinstance(job.opponent, Candidate) else job.reference
    names = job.policy.name, "reference" if other == job.reference else other.name
    ours, theirs = (re.sub(r"[^\w+-]+", "_", Path(name).name, flags=re.ASCII) or "policy" for name in names)
    if ours == theirs:
        ours, theirs = "policy", "other"
    return replace(job.policy, name=ours), replace(other, name=theirs)


@contextmanager
def speakers_of(job: Job, max_new_tokens: int) -> Iterator[tuple[Speaker, Speaker]]:
    """Both models, ready to answer; what the other one says serves every job of a sweep."""
    policy, other = models_of(job)
    asking = Asking(max_new_tokens, job.options.win_rate.chunk, job.options.win_rate.seed)
    with (
        Journal(job.folder / "benchmark_answers.jsonl") as ours,
        Journal(job.shared / "opponent_benchmark_answers.jsonl") as theirs,
    ):
        yield local_speaker(policy, ours, asking), local_speaker(other, theirs, asking)


def difference_lines(found: Found, form: str) -> Iterator[Line]:
    """The row of the difference of policy and reference, where there is one."""
    if test := found["difference"]:
        yield line("… less the reference's", test["value"], test["low"], test["high"], form)


class Gate(Part):
    """The regression gate."""

    def check(self, job: Job) -> None:
        check_harness(asked(job.options.gate))

    def measure(self, job: Job) -> Found:
        return {"status": "done", **run_harness(*models_of(job), asked(job.options.gate), job.folder)}

    def headline(self, found: Found) -> Found:
        return {"gate": found["gate"]}

    def lines(self, found: Found) -> Iterator[Line]:
        yield f"regression gate (loss up to {found['gate']['limit']:g})", found["gate"]["verdict"], ""
        for task in found["tasks"]:
            label = f"{task['task']}, {task['metric']}, {task['n']:,} samples: {task['verdict']}"
            yield line(label, task["difference"], task["low"], task["high"], "+.3f")

    def warnings(self, found: Found) -> Iterator[str]:
        if not found["gate"]["passed"]:
            yield f"REGRESSION GATE FAILED: {found['gate']['reason']}"

    def notes(self, found: Found) -> Iterator[str]:
        if found["gate"]["passed"]:
            yield f"Gate {found['gate']['verdict']}: {found['gate']['reason']}."


class AlpacaEval(Part):
    """AlpacaEval 2; waiting until the policy's outputs are annotated."""

    def check(self, job: Job) -> None:
        read_instructions(asked(job.options.alpaca_eval))

    def measure(self, job: Job) -> Found:
        options = asked(job.options.alpaca_eval)
        with speakers_of(job, options.max_new_tokens) as speakers:
            found = run_alpaca(*speakers, options, job.folder, job.shared)
            result = found["models"][speakers[0].name]["result"]
        return {"status": "done" if result else "waiting", "policy": result, **found}

    def headline(self, found: Found) -> Found:
        if not (result := found["policy"]):
            return {}
        rates = {"alpaca_eval_win_rate": result, "alpaca_eval_win_rate_length_controlled": result["length_controlled"]}
        return {
            f"{name}{end and '_'}{end}": rate.get(end or "win_rate")
            for name, rate in rates.items()
            for end in ("", "low", "high")
        }

    def lines(self, found: Found) -> Iterator[Line]:
        if result := found["policy"]:
            label = f"AlpacaEval against {result['baseline']}, {result['n']:,} prompts"
            yield line(label, result["win_rate"], result["low"], result["high"])
            controlled = result["length_controlled"]
            if controlled["win_rate"] is not None:
                yield line("… length-controlled", controlled["win_rate"], controlled["low"], controlled["high"])
            yield from difference_lines(found, "+.3f")

    def notes(self, found: Found) -> Iterator[str]:
        for name, model in found["models"].items():
            if not model["result"]:
                yield f"AlpacaEval: the answers of {name} wait for their annotation: {model['command']}"


class MTBench(Part):
    """MT-Bench, graded by the language model of `judge=llm`."""

    def check(self, job: Job) -> None:
        if not isinstance(job.options.judge, LLMJudge):
            raise ConfigError(
                "parts=[mt_bench] needs a language model that grades: add judge=llm "
                "judge.base_url=http://localhost:8000/v1 judge.model=…"
            )
        read_questions(asked(job.options.mt_bench))

    def measure(self, job: Job) -> Found:
        options, judge = asked(job.options.mt_bench), job.options.judge
        assert isinstance(judge, LLMJudge)
        with speakers_of(job, options.max_new_tokens) as speakers:
            found = run_mt_bench(*speakers, options, judge, job.folder, job.shared)
            return {"policy": found["models"][speakers[0].name], **found}

    def headline(self, found: Found) -> Found:
        keys = {"": "mean", "_low": "low", "_high": "high", "_questions": "n"}
        return {f"mt_bench{end}": found["policy"][key] for end, key in keys.items()}

    def lines(self, found: Found) -> Iterator[Line]:
        grades = found["policy"]
        labels = {f"MT-Bench, 1 to 10, {grades['n']:,} questions": grades}
        labels |= {f"… {category}": of_category for category, of_category in grades["categories"].items()}
        for label, mean in labels.items():
            if mean["mean"] is not None:
                yield line(label, mean["mean"], mean["low"], mean["high"], ".2f")
        yield from difference_lines(found, "+.2f")

    def notes(self, found: Found) -> Iterator[str]:
        for key, what in (("unparsable", "cannot be read"), ("unjudged", "are missing")):
            if count := sum(model[key] for model in found["models"].values()):
                yield f"MT-Bench: {count} grades {what}; the means are of the others."
        if found["without_reference"]:
            yield f"MT-Bench: {found['without_reference']} questions were graded without a reference answer of theirs."


class Domain(Part):
    """A labelled file of one's own."""

    def check(self, job: Job) -> None:
        read_labelled(asked(job.options.domain))

    def measure(self, job: Job) -> Found:
        options = asked(job.options.domain)
        with speakers_of(job, options.max_new_tokens) as speakers:
            found = run_domain(*speakers, options, job.folder)
            return {"status": "done", "unrecognised_of_policy": found["unrecognised"].get(speakers[0].name, 0), **found}

    def headline(self, found: Found) -> Found:
        """domain_accuracy, _low, _high (of the policy), _difference, _difference_low, _difference_high; so for each."""
        keys = {"": "policy", "_low": "policy_low", "_high": "policy_high", "_difference": "difference",
                "_difference_low": "low", "_difference_high": "high"}  # fmt: skip
        return {
            f"domain_{re.sub('[^a-z0-9]+', '_', figure['metric'].lower()).strip('_')}{end}": figure[key]
            for figure in found["figures"]
            for end, key in keys.items()
        }

    def lines(self, found: Found) -> Iterator[Line]:
        for figure in found["figures"]:
            form = ".1f" if figure["metric"] == "BLEU" else ".3f"
            label = f"{figure['metric']}, {figure['n']:,} rows of one's own"
            yield line(label, figure["policy"], figure["policy_low"], figure["policy_high"], form)
            yield line("… less the reference's", figure["difference"], figure["low"], figure["high"], f"+{form}")

    def notes(self, found: Found) -> Iterator[str]:
        if count := found["unrecognised_of_policy"]:
            yield (
                f"{count} of {found['n']} answers name no label, or several, and count as wrong: read domain.jsonl, or "
                "set domain.pattern."
            )
