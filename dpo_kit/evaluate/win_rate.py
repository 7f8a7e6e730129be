"""The answers of both sides to the same held-out prompts (drawn here, asked of a server, or read from a file) before a
judge: verdicts in both orders, win rates with their intervals, the judge's own controls, a sheet for people.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from dpo_kit.config.building import ServerAnswers
from dpo_kit.config.places import file_faults, judge_faults, rows_faults
from dpo_kit.config.settings import Data, LLMJudge
from dpo_kit.data.read import read_whole
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.job import Candidate, Job
from dpo_kit.evaluate.part import Found, Line, Note, Part
from dpo_kit.evaluate.picture import DOUBTS, SCORING
from dpo_kit.evaluate.sequential import LOOKING, ConfidenceSequence, settled
from dpo_kit.judge.answers import Answer, Asking, draw_answers, draw_locally
from dpo_kit.judge.correction import correct, could_be
from dpo_kit.judge.open import judge_identity, open_judge
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.verdicts import Judge, Shown, Verdict, compare, run_controls, summarize_verdicts
from dpo_kit.model.chats import Prompt, as_messages, conversation_text
from dpo_kit.run.files import digest, write_jsonl, write_text
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.measures import MEASURE, WIN_RATES, win_rate_key
from dpo_kit.run.redact import redact, redact_text
from dpo_kit.run.report.markdown import fence, inline
from dpo_kit.run.report.numbers import labelled_rows
from dpo_kit.run.statistics import means_by_name, needed_against_half

EACH = 4  # of the losses, of the wins, of the rest in samples.md
LEAST = 20  # prompts; a bootstrap over fewer of them is too narrow to call a winner by
LOOK = 32  # prompts that are judged between two looks at whether the rate is settled
CUT = 0.05  # share of cut answers from which a reader must know
NO_JUDGE = "no judge: say judge=llm judge.base_url=… judge.model=…, judge=reward_model judge.path=…, or judge=human"
UNJUDGED = Verdict("unjudged", "unjudged")
Rate = tuple[float, float, float] | None  # value, low, high
Question = tuple[str, Prompt]  # prompt_id, and the prompt in the form in which the policy was trained on prompts


@dataclass
class Compared:
    """One answer of the policy beside one of its opponent, and the verdict on the policy's; None: no answer came.
    `vote`: the points that people give it, None where they did not look.
    """

    prompt_id: str
    prompt: Prompt
    draw: int
    policy: Answer | None
    opponent: Answer | None
    verdict: Verdict = UNJUDGED
    vote: float | None = None

    @property
    def shown(self) -> Shown | None:
        """What the judge sees; None where an answer is missing."""
        return Shown(self.prompt, self.policy.text, self.opponent.text) if self.policy and self.opponent else None


def measure_win_rate(job: Job) -> Found:
    """The policy's answers against the opponent's, as the judge sees them; verdicts.jsonl and samples.md beside it.
    `status`: done, partial (an answer or a verdict failed: the same command tries again), waiting (for people), or
    skipped where no judge is configured. `settled`: what ended the verdicts early, if anything did, and `left_out` the
    comparisons that were spared. Raises ConfigError, DataError, ModelError.
    """
    settings, wanted = job.options.judge, job.options.win_rate
    if settings is None:
        return {"status": "skipped", "reason": NO_JUDGE}
    questions = read_questions(job)
    prompts = [prompt for _, prompt in questions]
    ours, our_cost = answer(job, "policy", prompts)
    theirs, their_cost = answer(job, "opponent", prompts)
    compared = [
        Compared(name, prompt, draw, *pair)
        for (name, prompt), *answers in zip(questions, ours, theirs, strict=True)
        for draw, pair in enumerate(zip(*answers, strict=True))
    ]
    whole = [row for row in compared if row.shown]
    sheet = ReviewSheet(job.folder / "review.csv", seed=wanted.seed)
    sequence, reviewed = None, job.options.review or sheet.copies  # people's votes need a number fixed beforehand
    if wanted.stop_early and isinstance(settings, LLMJudge) and job.options.sweep is None and not reviewed:
        sequence = ConfidenceSequence()
    with open_judge(settings, job.shared, wanted.seed) as judge:
        controls = []
        if isinstance(settings, LLMJudge):
            firsts = [(prompt, first.text) for prompt, (first, *_) in zip(prompts, theirs, strict=True) if first]
            if some := [(prompt, text) for prompt, text in firsts if text.strip()][: settings.controls]:
                tried, texts = map(list, zip(*some, strict=True))
                others, _ = answer(job, "opponent", tried, again=True)
                again = [first.text for (first,) in others if first]  # of all or of none
                controls = run_controls(judge, tried, texts, again if len(again) == len(tried) else None)
        asked = ask(judge, whole, sequence, seed=wanted.seed, within=wanted.within)
        spend = {"policy": our_cost, "opponent": their_cost, "judge": judge.spend()}
    compared = [row for row in compared if not row.shown or row.prompt_id in asked]
    seen = [row for row in compared if row.shown]
    judged = [(row.shown, row.verdict) for row in seen if row.shown]
    status = "done"
    if any(row.verdict.points is None for row in compared):
        status = "waiting" if len(judged) == len(compared) and settings.kind == "human" else "partial"
    rows = [
        {"prompt_id": row.prompt_id, "draw": row.draw, "prompt": redact(row.prompt),
         "policy": row.policy and redact_text(row.policy.text),
         "opponent": row.opponent and redact_text(row.opponent.text),
         "policy_cut": row.policy and row.policy.cut, "opponent_cut": row.opponent and row.opponent.cut,
         "outcome": row.verdict.outcome, "points": row.verdict.points,
         "policy_first": row.verdict.a_first, "opponent_first": row.verdict.b_first}
        for row in compared
    ]  # fmt: skip
    review = None if settings.kind == "human" else sheet.check(judged, job.options.review)
    if review:
        for row, vote in zip(seen, sheet.points([shown for shown, _ in judged]), strict=True):
            row.vote = vote
    found = {
        "status": status, "policy": job.policy.name, "opponent": job.opponent_name,
        "split": job.split if wanted.prompts is None else None, "settings": redact(wanted.model_dump()),
        "judge": {"name": judge.name, **redact(judge_identity(settings))},
        "questions": len(questions), **win_rates(compared, sequence=sequence, within=wanted.within),
        "left_out": len(whole) - len(judged), "controls": controls, "review": review, "spend": redact(spend),
    }  # fmt: skip
    write_jsonl(job.folder / "verdicts.jsonl", rows)
    write_samples(job.folder / "samples.md", compared, policy=job.policy.name, opponent=job.opponent_name)
    return found


def ask(
    judge: Judge, rows: Sequence[Compared], sequence: ConfidenceSequence | None, *, seed: int, within: float
) -> set[str]:
    """Have `judge` compare the answers of `rows` and keep its verdicts there; the names of the prompts it was asked.

    With a `sequence` prompts come by lot, so many at a time, until it settles the rate.
    """
    by_prompt: dict[str, list[Compared]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    names, at_a_time = list(by_prompt), len(by_prompt) or 1
    if sequence is not None:
        names, at_a_time = sorted(names, key=lambda name: key_of("order", seed, name)), LOOK
    for start in range(0, len(names), at_a_time):
        some = [row for name in names[start : start + at_a_time] for row in by_prompt[name]]
        shown = [row.shown for row in some if row.shown]
        for row, verdict in zip(some, compare(judge, *map(list, zip(*shown, strict=True))), strict=True):
            row.verdict = verdict
        if sequence is not None:
            sequence.add(list(_points_by_prompt(some).values()))
            if settled(sequence.low, sequence.high, within):
                return set(names[: start + at_a_time])
    return set(names)


def read_questions(job: Job) -> list[Question]:
    """The prompts of `win_rate.prompts`, else one for each held-out prompt, at most `win_rate.limit`. DataError."""
    wanted = job.options.win_rate
    if wanted.prompts is None:
        _, rows = job.held_out()
        distinct = {row["prompt_id"]: row["prompt"] for row in reversed(rows)}
        return list(reversed(distinct.items()))[: wanted.limit]
    from dpo_kit.data.build.prompts import read_prompts

    data = Data(**job.config["data"])
    prompts, _ = read_prompts(wanted.prompts, data, wanted.limit)
    chat = job.reader.tokenizer().chat_template is not None if data.wrap_as_chat == "auto" else data.wrap_as_chat
    return [(digest(prompt), as_messages(prompt) if chat else prompt) for prompt in prompts]


def answer(
    job: Job, side: Literal["policy", "opponent"], prompts: Sequence[Prompt], *, again: bool = False
) -> tuple[list[list[Answer | None]], dict[str, Any]]:
    """For each prompt `win_rate.draws` answers (None where one failed), and what they cost; with `again` one answer
    each, under another seed ([] where answers are given in a file). Whatever was drawn before is read from the journal,
    and what the opponent answers serves every job of a sweep. Raises DataError, ModelError.
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

    def key(prompt: Prompt) -> str:
        return digest([[message.get("role"), message.get("content")] for message in as_messages(prompt)])

    given: dict[str, list[Answer | None]] = {}
    for row in read_whole("against", str(path)):
        prompt, text = row.values.get("prompt"), row.values.get("answer")
        if not isinstance(text, str) or not isinstance(prompt, str | list):
            raise DataError(f"{row.place}: a row needs prompt and answer, got the columns {', '.join(row.values)}")
        given.setdefault(key(prompt), []).append(Answer(text, False, path.name))
    answers = [given.get(key(prompt), [])[:draws] for prompt in prompts]
    if lacking := [prompt for prompt, drawn in zip(prompts, answers, strict=True) if len(drawn) < draws]:
        raise DataError(
            f"against={path} has fewer than win_rate.draws={draws} answers to {len(lacking)} of {len(prompts)} "
            f"prompts, the first: {str(lacking[0])[:80]!r}; win_rate.prompts={path} asks just those that it answers"
        )
    return answers


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


def win_rates(
    compared: Sequence[Compared],
    draws: int = 2000,
    *,
    sequence: ConfidenceSequence | None = None,
    within: float = 0.0,
) -> Found:
    """Win rates of the policy (shares; 95 % intervals by bootstrap over prompts), and what they rest on.

    With enough votes of people `win_rate_corrected` is the rate that they would give (judge/correction.py), which the
    verdict then reads. Where verdicts were asked for under a `sequence`, the interval of `win_rate` is its own if it
    `settled` the rate; if not, a bootstrap that leaves room for the looks that were taken.

    A prompt of several answers counts once, by its mean. `win_rate`: win 1, loss 0, tie or order-dependent ½.
    `win_rate_without_ties`: of the verdicts that both orders give. `win_rate_length_controlled_without_difficulty`:
    expected at answers of equal length, as in AlpacaEval 2 (arXiv:2404.04475) but without its instruction difficulty,
    which exists for its own prompts only. All None where nothing is judged.
    """
    judged = [row for row in compared if row.verdict.points is not None]
    decided = [row for row in judged if row.verdict.outcome in ("win", "loss")]
    prompts, ended = len({row.prompt_id for row in judged}), None
    rate = _by_prompt(judged, draws, 0.05 - LOOKING if sequence else 0.05)
    if sequence and rate and (ended := settled(sequence.low, sequence.high, within)):
        rate = rate[0], sequence.low, sequence.high
    points, votes = [row.verdict.points or 0.0 for row in judged], [row.vote for row in judged]
    corrected = correct(points, votes, [row.prompt_id for row in judged])
    best: Rate = corrected[:3] if corrected else rate
    verdict = f"within ±{within:g}" if ended == "within" and not corrected else read_verdict(best, prompts)
    needed = best and needed_against_half(best[0])
    found = {
        "prompts": prompts,
        **_named("win_rate", rate),
        "settled": ended,
        **_named("win_rate_corrected", corrected and corrected[:3]),
        "reviewed": corrected and corrected.prompts,
        "win_rate_verdict": verdict,
        "win_rate_needed_prompts": needed and max(LEAST, needed),
        **_named("win_rate_without_ties", _by_prompt(decided, draws)),
        "decided": len(decided),
        **_named("win_rate_length_controlled_without_difficulty", _length_controlled(judged, draws)),
        "ties": sum(row.verdict.outcome == "tie" for row in judged),
        "order_inconsistent": sum(row.verdict.outcome == "order-dependent" for row in judged),
        **summarize_verdicts([row.verdict for row in compared]),
    }
    agreement = found.pop("order_agreement")
    found["order_inconsistency"] = None if agreement is None else 1 - agreement
    for side in ("policy", "opponent"):
        answers = [answer for row in judged if (answer := getattr(row, side))]
        found[f"{side}_answers"] = {
            "answers": len(answers),
            "mean_characters": fmean(len(answer.text) for answer in answers) if answers else None,
            "cut_share": fmean(answer.cut for answer in answers) if answers else None,
        }
    return found


def read_verdict(rate: Rate, prompts: int) -> Literal["better", "worse", "not separated"] | None:
    """What an interval against ½ over so many prompts allows to say."""
    if rate is None:
        return None
    if prompts < LEAST or rate[1] <= 0.5 <= rate[2]:
        return "not separated"
    return "better" if rate[1] > 0.5 else "worse"


def _points_by_prompt(rows: Sequence[Compared]) -> dict[str, float]:
    return means_by_name((row.prompt_id, points) for row in rows if (points := row.verdict.points) is not None)


def _by_prompt(judged: Sequence[Compared], draws: int, level: float = 0.05) -> Rate:
    import torch

    from dpo_kit.callbacks.metrics import bootstrap_interval

    if not (means := _points_by_prompt(judged)):
        return None
    values = torch.tensor(list(means.values()), dtype=torch.float64)
    return (float(values.mean()), *bootstrap_interval(values, list(means), draws, level))


def _length_controlled(judged: Sequence[Compared], draws: int) -> Rate:
    """None where there is nothing to tell length from quality by: no verdict, or all answers equally long."""
    import torch

    from dpo_kit.callbacks.metrics import length_controlled, length_controlled_interval

    shown = [row.shown for row in judged if row.shown]
    gaps = torch.tensor([float(len(policy) - len(opponent)) for _, policy, opponent in shown])  # in characters
    if len(set(gaps.tolist())) < 2:
        return None
    points = torch.tensor([row.verdict.points for row in judged], dtype=torch.float64)
    low, high = length_controlled_interval(points, gaps, [row.prompt_id for row in judged], draws)
    return None if math.isnan(low) else (length_controlled(points, gaps), low, high)


def _named(name: str, rate: Rate) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), rate or (None, None, None), strict=True))


class WinRate(Part):
    """The policy's answers against the opponent's, before a judge."""

    def check(self, job: Job) -> None:
        wanted = job.options.win_rate
        faults = [*judge_faults(job.options.judge)]
        faults += rows_faults("win_rate.prompts", wanted.prompts) if wanted.prompts else []
        if isinstance(job.opponent, Path) and wanted.opponent_server is None:
            faults += file_faults("against", str(job.opponent))
        if faults:
            raise ConfigError("\n".join(faults))

    def measure(self, job: Job) -> Found:
        return measure_win_rate(job)

    def headline(self, found: Found) -> Found:
        failed = [control["name"] for control in found["controls"] if not control["passed"]]
        rates = [f"{key}{end}" for key in WIN_RATES for end in ("", "_low", "_high")]
        keys = (*rates, "reviewed", "settled", "left_out", "win_rate_verdict", "win_rate_needed_prompts")
        judge = found["judge"] | {"controls_failed": failed}
        return {key: found.get(key) for key in keys} | {"win_rate_prompts": found["prompts"], "judge": judge}

    def tell(self, found: Found) -> Iterator[Line | Note]:
        yield f"against {found['opponent']}", f"{found['prompts']:,} prompts", ""
        yield from labelled_rows(found, {key: MEASURE[key].column for key in WIN_RATES})
        for key, label in DOUBTS.items():
            if found[key] is not None and found["judge"]["kind"] not in SCORING:
                yield f"judge: {label}", f"{found[key]:.0%}", ""
        if spared := found.get("left_out"):
            yield "verdicts spared, as the rate was settled", f"{spared:,}", ""
        if review := found.get("review"):
            same = "" if review["same_verdict"] is None else f", {review['same_verdict']:.0%} as the judge"
            yield "checked by people", f"{review['checked']}{same}", ""
        for side, spent in found["spend"].items():
            if spent.get("cost"):
                yield f"cost of {side}", f"{spent['cost']:.4g}", ""
        for control in found["controls"]:
            if not control["passed"]:
                points = "no verdict" if control["points"] is None else f"{control['points']:.2f}"
                yield Note(
                    f"JUDGE CONTROL FAILED: {control['name']}: {points}, expected {control['expected']}; "
                    "do not trust the win rate below",
                    first=True,
                )
        rate, needed = found["win_rate"], found["win_rate_needed_prompts"]
        if found["win_rate_verdict"] == "not separated":
            best = found[win_rate_key(found)]
            would = f"about {needed:,} prompts would tell a rate of {best:.3f} from .5" if needed else "it is .5 itself"
            yield Note(f"Not separated from {found['opponent']}: {would} ({found['prompts']:,} so far).")
        elif found["win_rate_verdict"] in ("better", "worse"):
            than = f"{found['win_rate_verdict']} than {found['opponent']}"
            yield Note(f"{found['policy']} is {than} ({found['judge']['name']}).")
        elif rate is not None:
            yield Note(f"{found['policy']} is as good as {found['opponent']}: {found['win_rate_verdict']} of ½.")
        accuracy = found["settings"].get("judge_accuracy")  # none in what an earlier version wrote
        if accuracy and rate is not None and found["judge"]["kind"] == "llm" and not found.get("reviewed"):
            alike, low, high = could_be(rate, accuracy)
            yield Note(
                f"A judge that is right in {accuracy:.0%} of its verdicts shows {rate:.3f} where the rate is "
                f"{alike:.3f}, if it errs alike on both sides, and where it is {low:.3f} to {high:.3f}, if it favours "
                "one: review=100 lets people put the rate right."
            )
        for side in ("policy", "opponent"):
            share = found[side + "_answers"]["cut_share"]
            if share and share > CUT:
                limit = f"win_rate.max_new_tokens={found['settings']['max_new_tokens']}"
                yield Note(f"{share:.0%} of the {side}'s answers were cut at {limit} and judged as cut.")
        if found["outcomes"]["unjudged"]:
            missing, asked = found["outcomes"]["unjudged"], found["comparisons"]
            yield Note(f"{missing} of {asked} comparisons have no verdict; the rate is of the others.")
