"""The answers of both sides to the same held-out prompts: drawn here, asked of a server, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_kit.config.settings import Data, ServerAnswers
from dpo_kit.errors import DataError
from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.rows import read_rows
from dpo_kit.judge.answers import Answer, Asking, draw_answers, draw_locally
from dpo_kit.model.chats import Prompt, as_messages
from dpo_kit.run.files import digest
from dpo_kit.run.journal import Journal


@dataclass(frozen=True)
class Question:
    """A prompt that both sides answer, in the form in which the policy was trained on prompts."""

    prompt_id: str
    prompt: Prompt


def read_questions(job: Job) -> list[Question]:
    """The prompts of `win_rate.prompts`, else one for each held-out prompt, at most `win_rate.limit`. DataError."""
    wanted = job.options.win_rate
    if wanted.prompts is None:
        _, rows = job.held_out()
        distinct = {row["prompt_id"]: row["prompt"] for row in reversed(rows)}
        return [Question(name, prompt) for name, prompt in reversed(distinct.items())][: wanted.limit]
    from dpo_kit.data.build.prompts import read_prompts

    data = Data(**job.config["data"])
    prompts = read_prompts(wanted.prompts, data, wanted.limit).prompts
    reader = job.reference if job.run else job.policy
    chat = reader.tokenizer().chat_template is not None if data.wrap_as_chat == "auto" else data.wrap_as_chat
    return [Question(digest(prompt), as_messages(prompt) if chat else prompt) for prompt in prompts]


def answer(
    job: Job, side: Literal["policy", "opponent"], questions: Sequence[Question], *, again: bool = False
) -> tuple[list[list[Answer | None]], dict[str, Any]]:
    """For each question `win_rate.draws` answers (None where one failed), and what they cost; with `again` one answer
    each, under another seed ([] where answers are given in a file).

    Whatever was drawn before is read from the journal, and what the opponent answers serves every job of a sweep.
    Raises DataError, ModelError.
    """
    wanted, prompts = job.options.win_rate, [question.prompt for question in questions]
    who: Candidate | Path = job.policy
    server, seed, kept = wanted.policy_server, wanted.seed, job.folder / "answers.jsonl"
    if side == "opponent":
        who, server, seed = job.opponent, wanted.opponent_server, wanted.opponent_seed
        kept = job.shared / "opponent_answers.jsonl"
    if isinstance(who, Path) and server is None:
        return [] if again else read_answers(who, prompts, wanted.draws), {}
    draws, seed = (1, int(digest(["again", seed])[:7], 16)) if again else (wanted.draws, seed)
    asking = Asking(wanted.max_new_tokens, wanted.chunk, seed, wanted.top_p)
    with Journal(kept) as journal:
        if server is not None:
            drawing = {"temperatures": [wanted.temperature], "top_p": wanted.top_p, "draws": draws}
            source = ServerAnswers(**(server.model_dump() | drawing))
            return draw_answers(source, job.policy.model, prompts, asking, journal)
        assert isinstance(who, Candidate)
        return draw_locally(who.sampler(), [wanted.temperature], draws, prompts, asking, journal), {}


def read_answers(path: Path, prompts: Sequence[Prompt], draws: int) -> list[list[Answer | None]]:
    """The answers of a file of rows with `prompt` and `answer`; further rows of a prompt are further draws.

    DataError where a row is malformed or a prompt lacks an answer.
    """
    given: dict[str, list[Answer | None]] = {}
    for row in read_rows("against", str(path)):
        prompt, text = row.values.get("prompt"), row.values.get("answer")
        if not isinstance(text, str) or not isinstance(prompt, str | list):
            raise DataError(f"{row.place}: a row needs prompt and answer, got the columns {', '.join(row.values)}")
        given.setdefault(_key(prompt), []).append(Answer(text, False, path.name))
    answers = [given.get(_key(prompt), [])[:draws] for prompt in prompts]
    if lacking := [prompt for prompt, drawn in zip(prompts, answers, strict=True) if len(drawn) < draws]:
        raise DataError(
            f"against={path} has fewer than win_rate.draws={draws} answers to {len(lacking)} of {len(prompts)} "
            f"prompts, the first: {str(lacking[0])[:80]!r}; win_rate.prompts={path} asks just those that it answers"
        )
    return answers


def _key(prompt: Any) -> str:
    return digest([[message.get("role"), message.get("content")] for message in as_messages(prompt)])
