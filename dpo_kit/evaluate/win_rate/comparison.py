"""The answers of both sides to the same held-out prompts (drawn here, asked of a server, or read from a file) before a
judge: verdicts in both orders, the judge's own controls, a sheet for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_kit.config.settings import Data, LLMJudge, ServerAnswers
from dpo_kit.data.read import read_whole
from dpo_kit.errors import DataError
from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.win_rate.rates import Compared, win_rates
from dpo_kit.judge.answers import Answer, Asking, draw_answers, draw_locally
from dpo_kit.judge.open import judge_identity, open_judge
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.verdicts import Shown, Verdict, compare, run_controls
from dpo_kit.model.chats import Prompt, as_messages, conversation_text
from dpo_kit.run.files import digest, write_jsonl, write_text
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.redact import redact, redact_text
from dpo_kit.run.report.markdown import fence, inline

Answers = Sequence[Sequence[Answer | None]]
EACH = 4  # of the losses, of the wins, of the rest in samples.md
UNJUDGED = Verdict("unjudged", "unjudged", "unjudged")
NO_JUDGE = "no judge: say judge=llm judge.base_url=… judge.model=…, judge=reward_model judge.path=…, or judge=human"


Question = tuple[str, Prompt]  # prompt_id, and the prompt in the form in which the policy was trained on prompts


def measure_win_rate(job: Job) -> dict[str, Any]:
    """The policy's answers against the opponent's, as the judge sees them; verdicts.jsonl and samples.md beside it.

    `status`: done, partial (an answer or a verdict failed: the same command tries again), waiting (for people), or
    skipped where no judge is configured. Raises ConfigError, DataError, ModelError.
    """
    settings, wanted = job.options.judge, job.options.win_rate
    if settings is None:
        return {"status": "skipped", "reason": NO_JUDGE}
    questions = read_questions(job)
    asked = [prompt for _, prompt in questions]
    ours, our_cost = answer(job, "policy", asked)
    theirs, their_cost = answer(job, "opponent", asked)
    with open_judge(settings, job.shared, wanted.seed) as judge:
        controls = []
        if isinstance(settings, LLMJudge):
            firsts = [(prompt, given[0]) for (_, prompt), given in zip(questions, theirs, strict=True)]
            some = [(prompt, first.text) for prompt, first in firsts if first and first.text.strip()]
            some = some[: settings.controls]
            prompts, texts = [prompt for prompt, _ in some], [text for _, text in some]
            others = answer(job, "opponent", prompts, again=True)[0] if prompts else []
            again = [given[0].text for given in others if given[0]]  # of all or of none
            if prompts:
                controls = run_controls(judge, prompts, texts, again if len(again) == len(prompts) else None)
        drawn = [
            (name, prompt, draw, *pair)
            for (name, prompt), *answers in zip(questions, ours, theirs, strict=True)
            for draw, pair in enumerate(zip(*answers, strict=True))
        ]
        whole = [(prompt, a.text, b.text) for _, prompt, _, a, b in drawn if a and b]
        verdicts = iter(compare(judge, *map(list, zip(*whole, strict=True))) if whole else [])
        compared = [
            Compared(name, prompt, draw, a, b, next(verdicts) if a and b else UNJUDGED)
            for name, prompt, draw, a, b in drawn
        ]
        spend = {"policy": our_cost, "opponent": their_cost, "judge": judge.spend()}
    status = "done"
    if any(row.verdict.points is None for row in compared):
        answered = all(row.policy is not None and row.opponent is not None for row in compared)
        status = "waiting" if answered and settings.kind == "human" else "partial"
    rows = [
        {
            "prompt_id": row.prompt_id,
            "draw": row.draw,
            "prompt": redact(row.prompt),
            "policy": redact_text(row.policy.text) if row.policy else None,
            "opponent": redact_text(row.opponent.text) if row.opponent else None,
            "policy_cut": row.policy.cut if row.policy else None,
            "opponent_cut": row.opponent.cut if row.opponent else None,
            "outcome": row.verdict.outcome,
            "points": row.verdict.points,
            "policy_first": row.verdict.a_first,
            "opponent_first": row.verdict.b_first,
        }
        for row in compared
    ]
    judged = [(Shown(r.prompt, r.policy.text, r.opponent.text), r.verdict) for r in compared if r.policy and r.opponent]
    sheet = ReviewSheet(job.folder / "review.csv", seed=wanted.seed)
    found = {
        "status": status,
        "policy": job.policy.name,
        "opponent": job.opponent_name,
        "split": job.split if wanted.prompts is None else None,
        "settings": redact(wanted.model_dump()),
        "judge": {"name": judge.name, **redact(judge_identity(settings))},
        "questions": len(questions),
        **win_rates(compared),
        "controls": controls,
        "review": None if settings.kind == "human" else sheet.check(judged, job.options.review),
        "spend": redact(spend),
    }
    write_jsonl(job.folder / "verdicts.jsonl", rows)
    write_samples(job.folder / "samples.md", compared, policy=job.policy.name, opponent=job.opponent_name)
    return found


def read_questions(job: Job) -> list[Question]:
    """The prompts of `win_rate.prompts`, else one for each held-out prompt, at most `win_rate.limit`. DataError."""
    wanted = job.options.win_rate
    if wanted.prompts is None:
        _, rows = job.held_out()
        distinct = {row["prompt_id"]: row["prompt"] for row in reversed(rows)}
        return list(reversed(distinct.items()))[: wanted.limit]
    from dpo_kit.data.build.prompts import read_prompts

    data = Data(**job.config["data"])
    prompts = read_prompts(wanted.prompts, data, wanted.limit).prompts
    reader = job.reference if job.run else job.policy
    chat = reader.tokenizer().chat_template is not None if data.wrap_as_chat == "auto" else data.wrap_as_chat
    return [(digest(prompt), as_messages(prompt) if chat else prompt) for prompt in prompts]


def answer(
    job: Job, side: Literal["policy", "opponent"], prompts: Sequence[Prompt], *, again: bool = False
) -> tuple[list[list[Answer | None]], dict[str, Any]]:
    """For each prompt `win_rate.draws` answers (None where one failed), and what they cost; with `again` one answer
    each, under another seed ([] where answers are given in a file).

    Whatever was drawn before is read from the journal, and what the opponent answers serves every job of a sweep.
    Raises DataError, ModelError.
    """
    wanted = job.options.win_rate
    who: Candidate | Path = job.policy
    server, seed, kept = wanted.policy_server, wanted.seed, job.folder / "answers.jsonl"
    if side == "opponent":
        who, server, seed = job.opponent, wanted.opponent_server, wanted.opponent_seed
        kept = job.shared / "opponent_answers.jsonl"
    if isinstance(who, Path) and server is None:
        return [] if again else read_answers(who, prompts, wanted.draws), {}
    draws, seed = (1, int(digest(["again", seed])[:7], 16)) if again else (wanted.draws, seed)
    asking = Asking(wanted.max_new_tokens, seed=seed, top_p=wanted.top_p)
    with Journal(kept) as journal:
        if server is not None:
            drawing = {"temperatures": [wanted.temperature], "top_p": wanted.top_p, "draws": draws}
            source = ServerAnswers(**(server.model_dump() | drawing))
            return draw_answers(source, job.policy.model, prompts, asking, journal)
        assert isinstance(who, Candidate)
        return draw_locally(who.sampler(), [wanted.temperature], draws, prompts, asking, journal), {}


def read_answers(path: Path, prompts: Sequence[Prompt], draws: int) -> list[list[Answer | None]]:
    """Answers of a file of {prompt, answer}; further rows are further draws. DataError: malformed, or missing."""
    given: dict[str, list[Answer | None]] = {}
    for row in read_whole("against", str(path)):
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


def write_samples(path: Path, compared: Sequence[Compared], *, policy: str, opponent: str) -> None:
    """Prompts with both answers side by side, drawn by lot; whatever stands in an answer stays inside its fence."""
    parts = [
        f"# {inline(policy)} and {inline(opponent)}, side by side\n\n"
        f"Up to {EACH} losses, {EACH} wins and {EACH} ties or order-dependent verdicts of the policy, drawn by lot out "
        f"of {len(compared)}.\n"
    ]
    for kinds in (("loss",), ("win",), ("tie", "order-dependent")):
        some = [row for row in compared if row.verdict.outcome in kinds]
        for row in sorted(some, key=lambda row: key_of("samples", row.prompt_id, row.draw))[:EACH]:
            cells = [
                f'<td width="50%" valign="top">\n\n**{inline(name)}**{" (cut)" if answer and answer.cut else ""}\n\n'
                f"{fence(answer.text if answer else '')}\n\n</td>\n"
                for name, answer in ((policy, row.policy), (opponent, row.opponent))
            ]
            table = f"<table><tr>\n{''.join(cells)}</tr></table>"
            parts.append(f"## {row.verdict.outcome}\n\n{fence(conversation_text(row.prompt))}\n\n{table}\n")
    write_text(path, "\n".join(parts))
