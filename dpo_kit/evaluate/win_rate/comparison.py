"""Both sides' answers before a judge: verdicts in both orders, the judge's own controls, a sheet for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_kit.config.settings import LLMJudge
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.win_rate.answers import Question, Side, answer, answer_again, read_questions, sides_of
from dpo_kit.evaluate.win_rate.rates import Compared, win_rates
from dpo_kit.evaluate.win_rate.samples import write_samples
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.open import (
    Judge,
    Raw,
    ReviewSheet,
    Shown,
    Verdict,
    compare,
    describe_controls,
    judge_identity,
    open_judge,
    run_controls,
)
from dpo_kit.run.files import write_jsonl
from dpo_kit.run.journal import key_of
from dpo_kit.run.redact import redact, redact_text

Answers = Sequence[Sequence[Answer | None]]
UNJUDGED = Verdict("unjudged", "unjudged", "unjudged")
NO_JUDGE = "no judge: say judge=llm judge.base_url=… judge.model=…, judge=reward_model judge.path=…, or judge=human"


def measure_win_rate(job: Job) -> dict[str, Any]:
    """The policy's answers against the opponent's, as the judge sees them; verdicts.jsonl and samples.md beside it.

    `status`: done, partial (an answer or a verdict failed: the same command tries again), waiting (for people), or
    skipped where no judge is configured. Raises ConfigError, DataError, ModelError.
    """
    settings = job.options.judge
    if settings is None:
        return {"status": "skipped", "reason": NO_JUDGE}
    questions = read_questions(job)
    sides = sides_of(job)
    (ours, our_cost), (theirs, their_cost) = (answer(job, side, questions) for side in sides)
    with open_judge(settings, job.shared, job.options.win_rate.seed) as judge:
        controls = _controls(job, judge, questions, theirs, sides[1])
        compared = judge_answers(judge, questions, ours, theirs)
        spend = {"policy": our_cost, "opponent": their_cost, "judge": judge.spend()}
    found = {
        "status": _status(compared, people=settings.kind == "human"),
        "policy": job.policy.name,
        "opponent": job.opponent_name,
        "split": job.split if job.options.win_rate.prompts is None else None,
        "settings": redact(job.options.win_rate.model_dump()),
        "judge": {"name": judge.name, **redact(judge_identity(settings))},
        "questions": len(questions),
        **win_rates(compared),
        "controls": controls,
        "review": _review(job, compared),
        "spend": redact(spend),
    }
    write_jsonl(job.folder / "verdicts.jsonl", map(_line, compared))
    write_samples(job.folder / "samples.md", compared, policy=job.policy.name, opponent=job.opponent_name)
    return found


def judge_answers(judge: Judge, questions: Sequence[Question], ours: Answers, theirs: Answers) -> list[Compared]:
    """Each draw of the policy against the same draw of the opponent, in the order of the questions."""
    rows = [
        (question, draw, *pair)
        for question, own, other in zip(questions, ours, theirs, strict=True)
        for draw, pair in enumerate(zip(own, other, strict=True))
    ]
    whole = [(question.prompt, a.text, b.text) for question, _, a, b in rows if a is not None and b is not None]
    verdicts = iter(compare(judge, *(list(each) for each in zip(*whole, strict=True))) if whole else [])
    return [
        Compared(q.prompt_id, q.prompt, draw, a, b, next(verdicts) if a is not None and b is not None else UNJUDGED)
        for q, draw, a, b in rows
    ]


def _controls(
    job: Job, judge: Judge, questions: Sequence[Question], answers: Answers, side: Side
) -> list[dict[str, Any]]:
    """How a language model as judge does on the controls, with the opponent's answers; empty for other judges."""
    settings = job.options.judge
    if not isinstance(settings, LLMJudge) or not settings.controls:
        return []
    usable = [(q, own[0].text) for q, own in zip(questions, answers, strict=True) if own[0] and own[0].text.strip()]
    some = usable[: settings.controls]
    if not some:
        return []
    asked = [question for question, _ in some]
    again = answer_again(job, side, asked)
    return describe_controls(run_controls(judge, [q.prompt for q in asked], [text for _, text in some], again))


def _status(compared: Sequence[Compared], *, people: bool) -> str:
    answered = all(each.policy is not None and each.opponent is not None for each in compared)
    if all(each.verdict.points is not None for each in compared):
        return "done"
    return "waiting" if answered and people else "partial"


def _review(job: Job, compared: Sequence[Compared]) -> dict[str, Any] | None:
    """The judge checked by people: a sheet is written when `review` asks for one, and read once there is one."""
    sheet = ReviewSheet(job.folder / "review.csv", seed=job.options.win_rate.seed)
    if job.options.judge is None or job.options.judge.kind == "human" or not (job.options.review or sheet.copies):
        return None
    judged = [each for each in compared if each.verdict.points is not None]
    some = sorted(judged, key=lambda each: key_of(job.options.win_rate.seed, each.prompt, each.draw))
    if not sheet.copies:
        sheet.write(_shown(each) for each in some[: job.options.review])
    raw: dict[str, Raw] = {"win": "first", "loss": "second"}
    verdicts: list[Raw] = [raw.get(each.verdict.outcome, "tie") for each in judged]
    return {"sheet": str(sheet.path), **sheet.agreement([_shown(each) for each in judged], verdicts)}


def _shown(each: Compared) -> Shown:
    assert each.policy is not None and each.opponent is not None
    return Shown(each.prompt, each.policy.text, each.opponent.text)


def _line(each: Compared) -> dict[str, Any]:
    """A row of verdicts.jsonl."""
    sides = {"policy": each.policy, "opponent": each.opponent}
    return {
        "prompt_id": each.prompt_id,
        "draw": each.draw,
        "prompt": redact(each.prompt),
        **{name: None if answer is None else redact_text(answer.text) for name, answer in sides.items()},
        **{f"{name}_cut": None if answer is None else answer.cut for name, answer in sides.items()},
        "outcome": each.verdict.outcome,
        "points": each.verdict.points,
        "policy_first": each.verdict.a_first,
        "opponent_first": each.verdict.b_first,
    }
