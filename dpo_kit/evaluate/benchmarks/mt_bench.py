"""MT-Bench: two-turn questions, each turn's answer graded from 1 to 10 by a language model.

Questions, answers and judgements have FastChat's formats, so that its tools read them (arXiv:2306.05685). Rubric and
verdict are our own: scores compare between models graded here, not with published ones.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeGuard

from dpo_kit.config.settings import LLMJudge
from dpo_kit.data.read import read_whole
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.options import MTBench
from dpo_kit.evaluate.part import Found, Line, Note, Part, Speaker, asked, line, speakers_of
from dpo_kit.judge.open import fenced, read_last_line
from dpo_kit.judge.server import Reply, Server
from dpo_kit.model.chats import Prompt
from dpo_kit.run.files import write_jsonl
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.statistics import means_by_name, paired_bootstrap

# FastChat's, fastchat/llm_judge/common.py
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                "stem": 0.1, "humanities": 0.1}  # fmt: skip
OTHER_TEMPERATURE = 0.7
REFERENCED = ("math", "reasoning", "coding")
UNPARSABLE = -1  # as FastChat writes it, and leaves it out of its means
INSTRUCTIONS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")  # the rubric, and how to answer
TASKS = ("Grade the answer.", "Grade the answer to question 2, given all that was said before it.")
GRADE = re.compile(r"\[\[(10|[1-9])\]\]")


@dataclass(frozen=True)
class Question:
    """One question: its turns (one or two), and an answer to each that is known to be right (or none)."""

    id: int | str
    category: str
    turns: list[str]
    references: list[str]

    @property
    def temperature(self) -> float:
        """At which FastChat has it answered."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Grade:
    """What the judge said of one turn; `score` is None where there is no reply, −1 where it cannot be read."""

    question: Question
    turn: int
    prompt: str
    judgment: str
    score: int | None


class MTBenchPart(Part):
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
            return run_mt_bench(*speakers, options, judge, job.folder, job.shared)

    def headline(self, found: Found) -> Found:
        keys = {"": "mean", "_low": "low", "_high": "high", "_questions": "n"}
        return {f"mt_bench{end}": found["policy"][key] for end, key in keys.items()}

    def tell(self, found: Found) -> Iterator[Line | Note]:
        grades = found["policy"]
        labels = {f"MT-Bench, 1 to 10, {grades['n']:,} questions": grades}
        labels |= {f"… {category}": of_category for category, of_category in grades["categories"].items()}
        yield from (line(label, mean, "mean", ".2f") for label, mean in labels.items() if mean["mean"] is not None)
        if test := found["difference"]:
            yield line("… less the reference's", test, "value", "+.2f")
        for key, what in (("unparsable", "cannot be read"), ("unjudged", "are missing")):
            if count := sum(model[key] for model in found["models"].values()):
                yield Note(f"MT-Bench: {count} grades {what}; the means are of the others.")
        if found["without_reference"]:
            yield Note(
                f"MT-Bench: {found['without_reference']} questions were graded without a reference answer of theirs."
            )


def run_mt_bench(
    policy: Speaker, reference: Speaker, options: MTBench, judge: LLMJudge, folder: Path, shared: Path
) -> Found:
    """Answers, judgements and means of both models; the same call goes on where an earlier one stopped.

    {policy, questions, status: done | partial, models: {name: {mean, low, high, n, turns, categories, unparsable,
    unjudged}}, difference, without_reference, spend}; n counts graded questions, intervals are bootstraps by question.
    `folder`/mt_bench/{model_answer,model_judgment}/ are in FastChat's formats. Replies are kept in `shared`,
    so that a sweep pays for those on the reference once.
    """
    questions, place = read_questions(options), folder / "mt_bench"
    graded, judgements = {}, []
    with Journal(shared / "mt_bench_replies.jsonl") as journal:
        server = Server(judge, journal)
        for speaker in (policy, reference):
            answers = ask_questions(speaker, questions)
            rows = [
                {"question_id": name, "answer_id": key_of(speaker.name, name, turns)[:22], "model_id": speaker.name,
                 "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}
                for name, turns in answers.items()
            ]  # fmt: skip
            write_jsonl(place / "model_answer" / f"{speaker.name}.jsonl", rows)
            graded[speaker.name] = grade_answers(server, judge, questions, answers)
            judgements += [
                {"question_id": grade.question.id, "model": speaker.name,
                 "judge": [judge.model, "single-dpo-kit-v1" + ("-multi-turn" if grade.turn > 1 else "")],
                 "user_prompt": grade.prompt, "judgment": grade.judgment, "score": grade.score, "turn": grade.turn,
                 "tstamp": time.time()}
                for grade in graded[speaker.name] if grade.score is not None
            ]  # fmt: skip
        spend = server.spend()
    write_jsonl(place / "model_judgment" / f"{judge.model.replace('/', '_')}_single.jsonl", judgements)
    models = {name: summarize_grades(grades) for name, grades in graded.items()}
    return {
        "policy": models[policy.name], "questions": len(questions),
        "status": "partial" if any(means["unjudged"] for means in models.values()) else "done",
        "models": models, "difference": compare_grades(*graded.values()),
        "without_reference": sum(each.category in REFERENCED and not each.references for each in questions),
        "spend": spend,
    }  # fmt: skip


def read_questions(options: MTBench) -> list[Question]:
    """FastChat's questions, with references from them or `options.references`. DataError names file and line."""
    known: dict[int | str, Any] = {}
    for row in read_whole("mt_bench.references", options.references) if options.references else ():
        try:
            known[row.values["question_id"]] = row.values["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{row.place} must be in FastChat's format (choices[0].turns): {error}") from error
    questions = []
    for row in read_whole("mt_bench.questions", options.questions):
        name, turns = row.values.get("question_id"), row.values.get("turns")
        if name is None or not _are_texts(turns) or not 1 <= len(turns) <= 2:
            raise DataError(
                f"{row.place} must have question_id, category and one or two turns, as FastChat's question.jsonl"
            )
        references = row.values.get("reference") or known.get(name, [])
        if not _are_texts(references):
            raise DataError(f"{row.place}: reference must be a list of texts, one for each turn")
        questions.append(Question(name, str(row.values.get("category", "other")), turns, references))
    if len({question.id for question in questions}) < len(questions) or not questions:
        raise DataError(f"mt_bench.questions={options.questions} must have questions, and each question_id once")
    return questions[: options.limit]


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def ask_questions(speaker: Speaker, questions: Sequence[Question]) -> dict[int | str, list[str]]:
    """{question id: answers}: each turn asked after the answers to those before, at its category's temperature."""
    answers: dict[int | str, list[str]] = {question.id: [] for question in questions}
    for temperature in sorted({question.temperature for question in questions}):
        warm = [question for question in questions if question.temperature == temperature]
        prompts: list[Prompt] = [question.turns[0] for question in warm]  # a first turn is plain text
        while warm:
            for question, answer in zip(warm, speaker.answer(prompts, temperature), strict=True):
                answers[question.id].append(answer.strip())
            warm = [question for question in warm if len(answers[question.id]) < len(question.turns)]
            prompts = [
                [{"role": "user", "content": question.turns[0]},
                 {"role": "assistant", "content": answers[question.id][0]},
                 {"role": "user", "content": question.turns[1]}] for question in warm
            ]  # fmt: skip
    return answers


def grade_answers(
    server: Server, judge: LLMJudge, questions: Sequence[Question], answers: Mapping[int | str, list[str]]
) -> list[Grade]:
    """A grade for every turn of every question; what the server's journal has is not asked again."""
    places, requests = [], []
    for question in questions:
        for turn in range(len(question.turns)):
            parts = {}
            for number in range(turn + 1):
                label = f" {number + 1}" if turn else ""
                parts[f"question{label}"] = question.turns[number]
                if question.category in REFERENCED and number < len(question.references):
                    parts[f"reference answer{label}"] = question.references[number]
                parts[f"answer{label}"] = answers[question.id][number]
            places.append((question, turn + 1))
            requests.append(fenced(judge, "mt_bench", INSTRUCTIONS.format(task=TASKS[turn]), parts, parts))
    return [
        Grade(*place, request.messages[0]["content"], reply.text if reply else "", read_grade(reply))
        for place, request, reply in zip(places, requests, server.ask(requests, "grades"), strict=True)
    ]


def read_grade(reply: Reply | None) -> int | None:
    """The grade on the last line that is not blank; −1 where that line is anything else, None without a reply."""
    return int(read_last_line(reply.text, GRADE) or UNPARSABLE) if reply else None


def summarize_grades(grades: Sequence[Grade]) -> Found:
    """Mean with interval over all turns, by turn and by category; what could not be read or was not judged counted."""
    categories = dict.fromkeys(grade.question.category for grade in grades)
    return _mean(grades) | {
        "turns": [_mean([grade for grade in grades if grade.turn == turn]) | {"turn": turn} for turn in (1, 2)],
        "categories": {each: _mean([g for g in grades if g.question.category == each]) for each in categories},
        "unparsable": sum(grade.score == UNPARSABLE for grade in grades),
        "unjudged": sum(grade.score is None for grade in grades),
    }


def _mean(grades: Sequence[Grade]) -> Found:
    """{mean, low, high, n}: 95 % bootstrap over questions (turns of one are not independent); None below one grade."""
    import torch

    from dpo_kit.callbacks.metrics import bootstrap_interval

    known = _known(grades)
    if not known:
        return {"mean": None, "low": None, "high": None, "n": 0}
    names, scores = [str(question) for question, _ in known], list(known.values())
    low, high = bootstrap_interval(torch.tensor(scores, dtype=torch.float64), names)
    return {"mean": fmean(scores), "low": low, "high": high, "n": len(set(names))}


def _known(grades: Sequence[Grade]) -> dict[tuple[int | str, int], int]:
    return {(g.question.id, g.turn): g.score for g in grades if g.score is not None and g.score != UNPARSABLE}


def compare_grades(policy: Sequence[Grade], reference: Sequence[Grade]) -> Found | None:
    """Policy − reference by question, over the turns that were graded for both; None below two such questions."""
    both = _known(policy), _known(reference)
    common = both[0].keys() & both[1].keys()
    means = [means_by_name((str(place[0]), side[place]) for place in common) for side in both]
    found = paired_bootstrap(means[0], means[1])
    return asdict(found) if found else None
