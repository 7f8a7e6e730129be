"""Who answers a benchmark's prompts: any callable with a name; a local candidate, its answers kept one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.judge.answers import Asking, draw_locally
from dpo_kit.model.chats import Prompt
from dpo_kit.run.journal import Journal


@dataclass(frozen=True)
class Speaker:
    """A model that answers: `answer(prompts, temperature)` gives one answer per prompt; temperature 0 is greedy.

    Its name becomes that of files.
    """

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
