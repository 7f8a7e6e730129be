"""`mode=build`: preference pairs from prompts, the models that answer them and a judge, or from raters' votes.

A build folder holds answers.jsonl and judgements.jsonl (journals: whatever was paid for is in them), manifest.json
(what was built), review.csv (where people judge or check), comparisons.jsonl, pairs.jsonl and, written last,
build_report.json. The same command goes on where a killed one stopped.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dpo_kit.config.identity import list_differences
from dpo_kit.config.settings import COST_ONLY, Endpoint, LLMJudge, LocalAnswers
from dpo_kit.data.build.pairing import OUTCOMES, Paired, different, pair_answers
from dpo_kit.data.build.plan import Plan, check_plan
from dpo_kit.data.build.prompts import Prompts, read_prompts
from dpo_kit.data.build.rated import pair_by_votes
from dpo_kit.data.gather import sources
from dpo_kit.errors import BuildError, ConfigError
from dpo_kit.judge.answers import Answer, Asking, draw_answers
from dpo_kit.judge.open import judge_identity, open_judge
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.server import refuse_silent
from dpo_kit.judge.verdicts import Shown, run_controls, summarize_verdicts
from dpo_kit.run.files import hash_weights, read_json, write_json, write_jsonl
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.redact import redact
from dpo_kit.run.words import training
from dpo_kit.toy import is_out_of_its_world

log = logging.getLogger(__name__)
Given = list[list[Answer | None]]  # for each prompt, the answers of all sources


def build_pairs(cfg: DictConfig) -> dict[str, Any]:
    """Build what `cfg` (model, data, judge, build, seed) describes, or what is missing of it; the build's report.

    Raises ConfigError, DataError and ModelError. `status` in the report says whether the build is done, partial (an
    answer or verdict failed: the same command tries again) or waiting (for people).
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
    read = read_prompts(plan.build.prompts, plan.data, plan.build.limit)
    files = [source.path for source in sources(plan.build.prompts or plan.data.train)]
    local = [source.path for source in plan.build.answers if isinstance(source, LocalAnswers)]
    if any(is_out_of_its_world(path, files) for path in local):
        log.warning(
            "the embedded model answers, which knows its own small world only: your own is model=local model.path=…"
        )
    identity: dict[str, Any] = {"seed": plan.seed}  # all that the pairs depend on, not what changes speed or cost only
    identity["build"] = plan.build.model_dump(exclude={"review", "answers"})
    identity["build"]["answers"] = [source.model_dump(exclude=set(COST_ONLY)) for source in plan.build.answers]
    for source in identity["build"]["answers"]:
        if "path" in source:  # weights are known by their content, wherever they lie
            source["path"] = hash_weights(source["path"]) or source["path"]
    identity["judge"] = judge_identity(plan.judge)
    identity["prompts"] = {"count": len(read.prompts), "content": key_of(read.prompts)}
    identity = redact(identity)
    folder = Path(plan.out or f"outputs/build-{key_of(identity)[:8]}")
    if not (folder / "answers.jsonl").exists():  # else all may have been answered
        for key, asked in (("judge", plan.judge), *(("build.answers", source) for source in plan.build.answers)):
            if isinstance(asked, Endpoint):
                refuse_silent(key, asked)
    asking = Asking(plan.build.max_new_tokens, seed=plan.seed)
    with Journal(folder / "answers.jsonl") as journal:
        claim(folder, identity)
        drawn = [draw_answers(source, plan.model, read.prompts, asking, journal) for source in plan.build.answers]
        by_prompt = zip(*(answers for answers, _ in drawn), strict=True)
        answers = [[answer for of_source in of_prompt for answer in of_source] for of_prompt in by_prompt]
        with open_judge(plan.judge, folder, plan.seed) as judge:
            controls: list[dict[str, Any]] = []
            if isinstance(plan.judge, LLMJudge):  # how a language model does where the right verdict is known
                differing = ((p, different(given)) for p, given in zip(read.prompts, answers, strict=True))
                some = [(p, given) for p, given in differing if len(given) > 1][: plan.judge.controls]
                texts = ([given[place].text for _, given in some] for place in (0, 1))
                controls = run_controls(judge, [p for p, _ in some], *texts) if some else []
            paired = pair_answers(judge, read.prompts, answers, plan.build, plan.seed)
            report = _report(plan, read, answers, paired) | {"folder": str(folder), "controls": controls}
            report["judge"] = {"name": judge.name, **summarize_verdicts([c.verdict for c in paired.comparisons])}
            report["spend"] = {"answers": [cost for _, cost in drawn if cost], "judge": judge.spend()}
        judged = [(Shown(c.prompt, c.a.text, c.b.text), c.verdict) for c in paired.comparisons]
        sheet = ReviewSheet(folder / "review.csv", seed=plan.seed)
        report["review"] = None if plan.judge.kind == "human" else sheet.check(judged, plan.build.review)
        comparisons = (
            {
                "prompt": compared.prompt,
                "a": compared.a.text,
                "b": compared.b.text,
                "source_a": compared.a.source,
                "source_b": compared.b.source,
                **dataclasses.asdict(compared.verdict),
            }
            for compared in paired.comparisons
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


def _report(plan: Plan, read: Prompts, answers: Given, paired: Paired) -> dict[str, Any]:
    wanted = [answer for of_prompt in answers for answer in of_prompt]
    given = [answer for answer in wanted if answer is not None]
    sides = {name: Counter(pair[f"source_{name}"] for pair in paired.pairs) for name in ("chosen", "rejected")}
    waits = len(given) == len(wanted) and plan.judge.kind == "human"
    return {
        "status": "done" if not paired.outcomes["failed"] else "waiting" if waits else "partial",
        "prompts": {"in": len(read.prompts), **{name: paired.outcomes[name] for name in OUTCOMES}},
        "rows_left_out": read.left_out,
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
        lines.append(("judge", judge["name"]))
        keys = ("order_agreement", "first_position_rate", "unparsable_rate")
        shares = zip(("orders agree", "first place", "unparsable"), keys, strict=True)
        lines.append(("", ", ".join(f"{name} {judge[key]:.0%}" for name, key in shares if judge[key] is not None)))
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
    folder = Path(report["folder"])
    if report["status"] == "waiting":
        sheet = folder / "review*.csv"
        remedy = f"next: fill in the column better of {sheet} (1, 2 or tie), then the same command"
        console.print(remedy, soft_wrap=True, markup=False)
    elif report["pairs"]:
        console.print(f"next: {training(words, folder / 'pairs.jsonl')}", soft_wrap=True, markup=False)
    if report["status"] == "partial":
        reasons: Counter[str] = Counter()
        for cost in spent:
            reasons.update(cost["failed"])
        why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        raise BuildError(
            f"{report['prompts']['failed']} of {report['prompts']['in']} prompts lack an answer or a verdict ({why}); "
            f"what is there is in {report['folder']}/pairs.jsonl, and the same command asks for the rest"
        )
