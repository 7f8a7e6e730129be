"""Both sides' answers before a judge: verdicts in both orders, the judge's own controls, a sheet for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_kit.config.settings import LLMJudge
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.win_rate.answers import Question, answer, read_questions
from dpo_kit.evaluate.win_rate.rates import Compared, win_rates
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.open import judge_identity, open_judge
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.verdicts import Judge, Raw, Shown, Verdict, compare, run_controls
from dpo_kit.model.chats import conversation_text
from dpo_kit.run.files import write_jsonl, write_text
from dpo_kit.run.journal import key_of
from dpo_kit.run.redact import redact, redact_text
from dpo_kit.run.report.markdown import fence, inline

Answers = Sequence[Sequence[Answer | None]]
EACH = 4  # of the losses, of the wins, of the rest in samples.md
UNJUDGED = Verdict("unjudged", "unjudged", "unjudged")
NO_JUDGE = "no judge: say judge=llm judge.base_url=… judge.model=…, judge=reward_model judge.path=…, or judge=human"


def measure_win_rate(job: Job) -> dict[str, Any]:
    """The policy's answers against the opponent's, as the judge sees them; verdicts.jsonl and samples.md beside it.

    `status`: done, partial (an answer or a verdict failed: the same command tries again), waiting (for people), or
    skipped where no judge is configured. Raises ConfigError, DataError, ModelError.
    """
    settings, wanted = job.options.judge, job.options.win_rate
    if settings is None:
        return {"status": "skipped", "reason": NO_JUDGE}
    questions = read_questions(job)
    ours, our_cost = answer(job, "policy", questions)
    theirs, their_cost = answer(job, "opponent", questions)
    with open_judge(settings, job.shared, wanted.seed) as judge:
        controls = []
        if isinstance(settings, LLMJudge):
            controls = _controls(job, judge, settings.controls, questions, theirs)
        compared = judge_answers(judge, questions, ours, theirs)
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
        "review": None if settings.kind == "human" else _review(job, compared),
        "spend": redact(spend),
    }
    write_jsonl(job.folder / "verdicts.jsonl", rows)
    write_samples(job.folder / "samples.md", compared, policy=job.policy.name, opponent=job.opponent_name)
    return found


def judge_answers(judge: Judge, questions: Sequence[Question], ours: Answers, theirs: Answers) -> list[Compared]:
    """Each draw of the policy against the same draw of the opponent, in the order of the questions."""
    rows = [
        (question, draw, *pair)
        for question, *answers in zip(questions, ours, theirs, strict=True)
        for draw, pair in enumerate(zip(*answers, strict=True))
    ]
    whole = [(question.prompt, a.text, b.text) for question, _, a, b in rows if a and b]
    verdicts = iter(compare(judge, *map(list, zip(*whole, strict=True))) if whole else [])
    return [
        Compared(question.prompt_id, question.prompt, draw, a, b, next(verdicts) if a and b else UNJUDGED)
        for question, draw, a, b in rows
    ]


def _controls(
    job: Job, judge: Judge, most: int, questions: Sequence[Question], answers: Answers
) -> list[dict[str, Any]]:
    """How a language model as judge does on the controls, with the opponent's answers to `most` questions."""
    usable = [
        (q, drawn[0].text) for q, drawn in zip(questions, answers, strict=True) if drawn[0] and drawn[0].text.strip()
    ]
    if not (some := usable[:most]):
        return []
    asked, texts = [question for question, _ in some], [text for _, text in some]
    others = [drawn[0] for drawn in answer(job, "opponent", asked, again=True)[0]]
    again = [other.text for other in others if other]  # of all or of none
    return run_controls(judge, [q.prompt for q in asked], texts, again if len(again) == len(asked) else None)


def _review(job: Job, compared: Sequence[Compared]) -> dict[str, Any] | None:
    """The judge checked by people: a sheet is written when `review` asks for one, and read once there is one."""
    seed = job.options.win_rate.seed
    sheet = ReviewSheet(job.folder / "review.csv", seed=seed)
    if not (job.options.review or sheet.copies):
        return None
    judged = [row for row in compared if row.policy and row.opponent and row.verdict.points is not None]
    shown = [Shown(row.prompt, row.policy.text, row.opponent.text) for row in judged if row.policy and row.opponent]
    if not sheet.copies:
        lots = {key_of(seed, row.prompt, row.draw): each for row, each in zip(judged, shown, strict=True)}
        sheet.write([lots[lot] for lot in sorted(lots)][: job.options.review])
    raw: dict[str, Raw] = {"win": "first", "loss": "second"}
    verdicts: list[Raw] = [raw.get(row.verdict.outcome, "tie") for row in judged]
    return {"sheet": str(sheet.path), **sheet.agreement(shown, verdicts)}


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
