"""What the benchmarks share: who answers their prompts, the policy and what it is compared with (the reference, or the
model that `against` names), each answer kept one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, line
from dpo_kit.judge.answers import Asking, draw_locally
from dpo_kit.model.chats import Prompt
from dpo_kit.run.journal import Journal

Options = TypeVar("Options")


def asked(options: Options | None) -> Options:
    """The options of a part that was asked for, which are there."""
    assert options is not None
    return options


@dataclass(frozen=True)
class Speaker:
    """A model: `answer(prompts, temperature)` gives an answer each, greedy at 0. Its name becomes that of files."""

    name: str
    answer: Callable[[Sequence[Prompt], float], list[str]]


def local_speaker(candidate: Candidate, journal: Journal, asking: Asking) -> Speaker:
    """A speaker for `candidate`, opened once something is to be answered; what `journal` has is not drawn again.

    Prompts that are text become a user turn where there is a chat template. DataError where prompts are messages, but
    there is none.
    """
    sampler = candidate.sampler()
    local = replace(sampler, open=cache(sampler.open), wrap=True)

    def answer(prompts: Sequence[Prompt], temperature: float) -> list[str]:
        drawn = draw_locally(local, [temperature], 1, prompts, asking, journal)
        return [each.text for (each,) in drawn if each is not None]

    return Speaker(candidate.name, answer)


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
    asking = Asking(max_new_tokens, seed=job.options.win_rate.seed)
    with (
        Journal(job.folder / "benchmark_answers.jsonl") as ours,
        Journal(job.shared / "opponent_benchmark_answers.jsonl") as theirs,
    ):
        yield local_speaker(policy, ours, asking), local_speaker(other, theirs, asking)


def difference_lines(found: Found, form: str) -> Iterator[Line]:
    """The row of the difference of policy and reference, where there is one."""
    if test := found["difference"]:
        yield line("… less the reference's", test["value"], test["low"], test["high"], form)
