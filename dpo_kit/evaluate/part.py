"""What a part of an evaluation is, how its figures are put into words, and how the benchmarks among them have their
prompts answered: by the policy and what it is compared with, each answer kept one by one.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dpo_kit.evaluate.job import Candidate, Job
from dpo_kit.judge.answers import Asking, draw_locally
from dpo_kit.model.chats import Prompt
from dpo_kit.run.journal import Journal
from dpo_kit.run.report.numbers import number_text, range_text

Found = dict[str, Any]
Line = tuple[str, str, str]  # measure, value, 95 % interval
Options = TypeVar("Options")


@dataclass(frozen=True)
class Note:
    """A sentence below the table; above it, in red, where it must be read first."""

    text: str
    first: bool = False


class Part:
    """One part of an evaluation: what it measures, and what of its findings (`found`, plain values) is shown."""

    def check(self, job: Job) -> None:
        """Refuse what can be seen to be wrong before anything is measured. ConfigError, DataError."""

    def measure(self, job: Job) -> Found:
        """The findings, with `status` (done, partial, waiting, skipped with `reason`) among them."""
        raise NotImplementedError

    def headline(self, found: Found) -> Found:
        """The few findings that result.json has, under the same names everywhere."""
        raise NotImplementedError

    def tell(self, found: Found) -> Iterable[Line | Note]:
        """What a reader sees of them: rows of the table on the terminal, sentences around it."""
        raise NotImplementedError


def line(label: str, figures: Mapping[str, Any], key: str, form: str = ".3f") -> Line:
    """A row of the table: the figure under `key`, from `low` to `high`; no interval where an end is not known."""
    ends = figures["low"], figures["high"]
    return label, number_text(figures[key], form), range_text(None if None in ends else ends, form)


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
    """The policy and what it is compared with (the reference, or the model that `against` names), under names that
    files can have.
    """
    other = job.opponent if isinstance(job.opponent, Candidate) else job.reference
    names = job.policy.name, "reference" if other == job.reference else other.name
    ours, theirs = (re.sub(r"[^\w+-]+", "_", Path(name).name, flags=re.ASCII) or "policy" for name in names)
    if ours == theirs:
        ours, theirs = "policy", "other"
    return replace(job.policy, name=ours), replace(other, name=theirs)


@contextmanager
def speakers_of(job: Job, max_new_tokens: int) -> Iterator[tuple[Speaker, Speaker]]:
    """Both models, ready to answer; what the other one says serves every job of a sweep."""
    asking = Asking(max_new_tokens, seed=job.options.win_rate.seed)
    files = job.folder / "benchmark_answers.jsonl", job.shared / "opponent_benchmark_answers.jsonl"
    with Journal(files[0]) as ours, Journal(files[1]) as theirs:
        policy, other = models_of(job)
        yield local_speaker(policy, ours, asking), local_speaker(other, theirs, asking)
