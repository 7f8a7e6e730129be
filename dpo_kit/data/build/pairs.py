"""`mode=build`: preference pairs from prompts, the models that answer them and a judge, or from raters' votes.

A build folder holds answers.jsonl and judgements.jsonl (journals: whatever was paid for is in them), manifest.json
(what was built), review.csv (where people judge or check), comparisons.jsonl, pairs.jsonl and, written last,
build_report.json. The same command goes on where a killed one stopped.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dpo_kit.config.building import Build, LocalAnswers
from dpo_kit.config.identity import list_differences
from dpo_kit.config.settings import COST_ONLY, Endpoint, LLMJudge
from dpo_kit.data.build.prompts import read_prompts
from dpo_kit.data.build.rated import pair_by_votes
from dpo_kit.data.gather import sources
from dpo_kit.data.options import Plan, check_plan
from dpo_kit.errors import BuildError, ConfigError
from dpo_kit.judge.answers import Answer, Asking, draw_answers
from dpo_kit.judge.open import judge_identity, open_judge
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.server import refuse_silent
from dpo_kit.judge.verdicts import Judge, Prompt, Shown, Verdict, compare, run_controls, summarize_verdicts, toss_coin
from dpo_kit.model.chats import answer_text, prompt_of, split_context
from dpo_kit.run.files import hash_weights, read_json, write_json, write_jsonl
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.redact import redact
from dpo_kit.run.words import training
from dpo_kit.toy import is_out_of_its_world

log = logging.getLogger(__name__)
Given = list[list[Answer | None]]  # for each prompt, the answers of all sources
OUTCOMES = ("pair", "tie", "order-dependent", "intransitive", "identical", "empty", "failed")
"""What becomes of a prompt. intransitive: the answer with most wins loses to the one with fewest; empty: fewer than two
answers have text; failed: an answer or a verdict is missing, so that the same command may still bring it."""
UNDECIDED = ("tie", "order-dependent")


def build_pairs(cfg: DictConfig) -> dict[str, Any]:
    """Build what `cfg` (model, data, judge, build, seed) describes, or what is missing of it; the build's report, whose
    `status` is done, partial (an answer or verdict failed: the same command tries again) or waiting (for people).

    Raises ConfigError, DataError and ModelError.
    """
    since = time.perf_counter()
    plan = check_plan(cfg)
    if votes := plan.build.votes:
        pairs, found = pair_by_votes(votes, plan.data)
        folder = Path(plan.out or f"outputs/build-{key_of(votes, pairs)[:8]}")
        claim(folder, {"votes": key_of(pairs)})
        write_jsonl(folder / "pairs.jsonl", pairs)
        report = {"status": "done", "folder": str(folder), "pairs": len(pairs), **found}
    else:
        report = _build_from_prompts(plan)
    report["seconds"] = round(time.perf_counter() - since, 1)
    write_json(Path(report["folder"]) / "build_report.json", redact(report))
    return report


def _build_from_prompts(plan: Plan) -> dict[str, Any]:
    prompts, left_out = read_prompts(plan.build.prompts, plan.data, plan.build.limit)
    files = [source.path for source in sources(plan.build.prompts or plan.data.train)]
    local = [source.path for source in plan.build.answers if isinstance(source, LocalAnswers)]
    if any(is_out_of_its_world(path, files) for path in local):
        yours = "your own is model=local model.path=…"
        log.warning("the embedded model answers, which knows its own small world only: %s", yours)
    identity: dict[str, Any] = {"seed": plan.seed}  # all that the pairs depend on, not what changes speed or cost only
    identity["build"] = plan.build.model_dump(exclude={"review", "answers"})
    identity["build"]["answers"] = [source.model_dump(exclude=set(COST_ONLY)) for source in plan.build.answers]
    for source in identity["build"]["answers"]:
        if "path" in source:  # weights are known by their content, wherever they lie
            source["path"] = hash_weights(source["path"]) or source["path"]
    identity["judge"] = judge_identity(plan.judge)
    identity["prompts"] = {"count": len(prompts), "content": key_of(prompts)}
    identity = redact(identity)
    folder = Path(plan.out or f"outputs/build-{key_of(identity)[:8]}")
    if not (folder / "answers.jsonl").exists():  # else all may have been answered
        for key, asked in (("judge", plan.judge), *(("build.answers", source) for source in plan.build.answers)):
            if isinstance(asked, Endpoint):
                refuse_silent(key, asked)
    asking = Asking(plan.build.max_new_tokens, seed=plan.seed)
    with Journal(folder / "answers.jsonl") as journal:
        claim(folder, identity)
        drawn = [draw_answers(source, plan.model, prompts, asking, journal) for source in plan.build.answers]
        by_prompt = zip(*(answers for answers, _ in drawn), strict=True)
        answers = [[answer for of_source in of_prompt for answer in of_source] for of_prompt in by_prompt]
        with open_judge(plan.judge, folder, plan.seed) as judge:
            controls: list[dict[str, Any]] = []
            if isinstance(plan.judge, LLMJudge):  # how a language model does where the right verdict is known
                differing = ((p, different(given)) for p, given in zip(prompts, answers, strict=True))
                some = [(p, given) for p, given in differing if len(given) > 1][: plan.judge.controls]
                texts = ([given[place].text for _, given in some] for place in (0, 1))
                controls = run_controls(judge, [p for p, _ in some], *texts) if some else []
            paired = pair_answers(judge, prompts, answers, plan.build, plan.seed)
            report = _report(plan, prompts, left_out, answers, paired) | {"folder": str(folder), "controls": controls}
            report["judge"] = {"name": judge.name, **summarize_verdicts([c.verdict for c in paired.comparisons])}
            report["spend"] = {"answers": [cost for _, cost in drawn if cost], "judge": judge.spend()}
        judged = [(Shown(c.prompt, c.a.text, c.b.text), c.verdict) for c in paired.comparisons]
        sheet = ReviewSheet(folder / "review.csv", seed=plan.seed)
        report["review"] = None if plan.judge.kind == "human" else sheet.check(judged, plan.build.review)
        comparisons = (
            {
                "prompt": prompt,
                "a": a.text,
                "b": b.text,
                "source_a": a.source,
                "source_b": b.source,
                "outcome": verdict.outcome,
            }
            | dataclasses.asdict(verdict)
            for prompt, a, b, verdict in paired.comparisons
        )
        write_jsonl(folder / "comparisons.jsonl", comparisons)
        write_jsonl(folder / "pairs.jsonl", paired.pairs)
    return report


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Note in `folder` what is built there. ConfigError, with the differing keys, where it is something else."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        write_json(manifest, identity)
    elif differing := list_differences(read_json(manifest), identity):
        lines = "\n".join(f"  {difference}" for difference in differing)
        raise ConfigError(f"out={folder} holds another build:\n{lines}\ntake another out=, or that config")


def _report(plan: Plan, prompts: list[Any], left_out: dict[str, int], answers: Given, paired: Paired) -> dict[str, Any]:
    wanted = [answer for of_prompt in answers for answer in of_prompt]
    given = [answer for answer in wanted if answer is not None]
    sides = {name: Counter(pair[f"source_{name}"] for pair in paired.pairs) for name in ("chosen", "rejected")}
    waits = len(given) == len(wanted) and plan.judge.kind == "human"
    return {
        "status": "done" if not paired.outcomes["failed"] else "waiting" if waits else "partial",
        "prompts": {"in": len(prompts), **{name: paired.outcomes[name] for name in OUTCOMES}},
        "rows_left_out": left_out,
        "pairs": len(paired.pairs),
        "coins": dict(paired.coins),
        "answers": {
            "wanted": len(wanted),
            "there": len(given),
            "empty": sum(not answer.text.strip() for answer in given),
            "cut": sum(answer.cut for answer in given),
            "cut_and_chosen": paired.cut,
            "max_new_tokens": plan.build.max_new_tokens,
        },
        "sources": {
            name: {"answers": count, **{side: sides[side][name] for side in sides}}
            for name, count in Counter(answer.source for answer in given).items()
        },
    }


# --- pairing -----------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Two answers to a prompt and the verdict on the first (`a`)."""

    prompt: Prompt
    a: Answer
    b: Answer
    verdict: Verdict

    def turned(self) -> Comparison:
        """The same with both answers in each other's place."""
        return Comparison(self.prompt, self.b, self.a, self.verdict.turned())


@dataclass
class Paired:
    """All comparisons, the pairs, and the number of prompts by outcome."""

    comparisons: list[Comparison] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    coins: Counter[str] = field(default_factory=Counter)
    cut: int = 0  # pairs whose chosen answer was cut


def pair_answers(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer | None]], build: Build, seed: int
) -> Paired:
    """Let `judge` compare the different answers of each prompt, and make pairs as `build` says."""
    paired = Paired()
    matches: list[list[tuple[Prompt, Answer, Answer]]] = []  # of each prompt
    for prompt, given in zip(prompts, answers, strict=True):
        texts = [answer.text for answer in given if answer is not None and answer.text.strip()]
        if None in given or len(set(texts)) < 2:
            paired.outcomes["failed" if None in given else "empty" if len(texts) < 2 else "identical"] += 1
        else:
            matches.append([(prompt, a, b) for a, b in combinations(different(given), 2)])
    every = [match for group in matches for match in group]
    texts_of_a, texts_of_b = [a.text for _, a, _ in every], [b.text for _, _, b in every]
    verdicts = iter(compare(judge, [prompt for prompt, _, _ in every], texts_of_a, texts_of_b))
    for group in matches:
        comparisons = [Comparison(*match, next(verdicts)) for match in group]
        paired.comparisons += comparisons
        if any(compared.verdict.outcome == "unjudged" for compared in comparisons):
            paired.outcomes["failed"] += 1
            continue
        chosen = comparisons if build.pairs == "all" else [_best_and_worst(paired, comparisons, seed)]
        pairs = [pair for compared in chosen for pair in _pairs(paired, compared, build, seed)]
        paired.pairs += pairs
        undecided = [compared.verdict.outcome for compared in chosen if compared.verdict.outcome in UNDECIDED]
        paired.outcomes["pair" if pairs else undecided[0] if undecided else "intransitive"] += 1
    asked = [prompt_of(pair) for pair in paired.pairs]
    for name in ("chosen", "rejected"):  # where the judge has a scale
        scores = judge.scores(asked, [answer_text(pair[name]) for pair in paired.pairs])
        for pair, score in zip(paired.pairs, scores or [], strict=False):
            pair[f"score_{name}"] = score
    return paired


def different(answers: Sequence[Answer | None]) -> list[Answer]:
    """The answers that have text, each text once."""
    return list({a.text: a for a in reversed(answers) if a is not None and a.text.strip()}.values())[::-1]


def _best_and_worst(paired: Paired, comparisons: list[Comparison], seed: int) -> Comparison:
    """The answer with most points (win 1, undecided ½) against the one with fewest; equal points by coin."""
    points: defaultdict[str, float] = defaultdict(float)
    for _, a, b, verdict in comparisons:
        points[a.text] += verdict.points or 0.0
        points[b.text] += 1 - (verdict.points or 0.0)
    prompt = comparisons[0].prompt
    ranked = sorted(points, key=lambda text: (-points[text], key_of(seed, prompt, text)))
    best, worst = ranked[0], ranked[-1]
    if len(ranked) > 2 and (points[best] == points[ranked[1]] or points[worst] == points[ranked[-2]]):
        paired.coins["equally many wins"] += 1
    between = next(compared for compared in comparisons if {compared.a.text, compared.b.text} == {best, worst})
    return between if between.a.text == best else between.turned()


def _pairs(paired: Paired, compared: Comparison, build: Build, seed: int) -> Iterator[dict[str, Any]]:
    """The pair that a comparison gives, if it gives one."""
    if compared.verdict.outcome == "loss" and build.pairs == "all":
        compared = compared.turned()
    outcome = compared.verdict.outcome
    if outcome in UNDECIDED and build.undecided == "coin":
        paired.coins[outcome] += 1
        if toss_coin(seed, compared.prompt, *sorted((compared.a.text, compared.b.text))):
            compared = compared.turned()
    elif outcome != "win":
        return
    prompt, context = split_context(compared.prompt)
    paired.cut += compared.a.cut
    yield context | {
        "prompt": prompt,
        "chosen": compared.a.in_form_of(prompt),
        "rejected": compared.b.in_form_of(prompt),
        "verdict": outcome,
        "source_chosen": compared.a.source,
        "source_rejected": compared.b.source,
    }


# --- what is shown -----------------------------------------------------------------------------------------------


def show_build(report: dict[str, Any], words: Sequence[str] = ()) -> None:
    """The short table at the end and the next command. BuildError where something is missing that can still come."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for control in report.get("controls") or []:
        if not control["passed"]:
            points = "no verdict" if control["points"] is None else f"{control['points']:.2f}"
            console.print(f"judge control failed: {control['name']}: {points}, expected {control['expected']}")
    counted = report.get("prompts") or report["items"]
    outcomes = ", ".join(f"{count} {name}" for name, count in counted.items() if count and name != "in")
    lines = [("prompts" if "prompts" in report else "items", f"{counted['in']} = {outcomes}")]
    lines.append(("pairs", str(report["pairs"])))
    if (answers := report.get("answers")) and answers["cut"]:
        counts = f"{answers['cut']} of {answers['there']} at build.max_new_tokens={answers['max_new_tokens']}"
        lines.append(("answers cut", f"{counts}, {answers['cut_and_chosen']} of them chosen: raise it"))
    if judge := report.get("judge"):
        keys = ("order_agreement", "first_position_rate", "unparsable_rate")
        shares = zip(("orders agree", "first place", "unparsable"), map(judge.get, keys), strict=True)
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares if share is not None)
        lines += [("judge", judge["name"]), ("", told)]
    if agreement := report.get("agreement"):
        alpha = agreement["krippendorff_alpha"]
        lines.append(("raters", f"{agreement['raters']}, alpha {'undefined' if alpha is None else f'{alpha:.3f}'}"))
    if review := report.get("review"):
        same = "" if review["same_verdict"] is None else f", {review['same_verdict']:.0%} as the judge"
        lines.append(("checked by people", f"{review['checked']}{same} ({review['sheet']})"))
    spend = report.get("spend") or {"answers": [], "judge": {}}
    spent = [cost for cost in (*spend["answers"], spend["judge"]) if "cost" in cost]
    lines += [("cost", f"{it['cost']:.4g} ({it['replies']} replies of {it['model']})") for it in spent]
    table = Table(box=None, show_header=False)
    for name, value in lines:
        table.add_row(name, escape(value))
    console.print(table)
    folder, follows = Path(report["folder"]), None
    if report["status"] == "waiting":
        sheet = folder / "review*.csv"
        follows = f"fill in the column better of {sheet} (1, 2 or tie), then the same command"
    elif report["pairs"]:
        follows = training(words, folder / "pairs.jsonl")
    if follows:
        console.print(f"next: {follows}", soft_wrap=True, markup=False)
    if report["status"] == "partial":
        reasons = sum((Counter(cost["failed"]) for cost in spent), Counter[str]())
        why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        lack = f"{counted['failed']} of {counted['in']} prompts lack an answer or a verdict ({why})"
        raise BuildError(f"{lack}; what is there is in {folder}/pairs.jsonl, and the same command asks for the rest")
