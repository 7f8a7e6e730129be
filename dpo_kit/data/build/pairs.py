"""`mode=build`: preference pairs from prompts, the models that answer them and a judge, or from raters' votes.

A build folder holds answers.jsonl and judgements.jsonl (journals: whatever was paid for is in them), manifest.json
(what was built), review.csv (where people judge or check), comparisons.jsonl, pairs.jsonl and, written last,
build_report.json. The same command goes on where a killed one stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_kit.config.compose import explain, unknown_key
from dpo_kit.config.places import data_faults, file_faults, is_local, judge_faults, model_faults
from dpo_kit.config.settings import COST_ONLY, Build, Data, Endpoint, LLMJudge, LocalAnswers, Model, Strict
from dpo_kit.config.settings import Judge as JudgeSettings
from dpo_kit.data.build.pairing import OUTCOMES, Comparison, Paired, different, pair_answers
from dpo_kit.data.build.prompts import Prompts, read_prompts
from dpo_kit.data.build.rated import pair_by_votes
from dpo_kit.errors import BuildError, ConfigError
from dpo_kit.judge.answers import Answer, Asking, draw_answers
from dpo_kit.judge.open import judge_identity, open_judge
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.server import refuse_silent
from dpo_kit.judge.verdicts import Judge, Shown, run_controls, summarize_verdicts
from dpo_kit.run.files import hash_weights, read_json, write_json, write_jsonl
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.redact import redact
from dpo_kit.run.words import training

Given = list[list[Answer | None]]
NO_PART_OF_IT = ("review", "answers")


class Plan(Strict):
    """What a build needs of the composed config."""

    seed: int
    model: Model
    data: Data
    judge: JudgeSettings
    build: Build
    out: str | None


def build_pairs(cfg: DictConfig) -> dict[str, Any]:
    """Build what `cfg` (model, data, judge, build, seed) describes, or what is missing of it; the build's report.

    Raises ConfigError, DataError and ModelError. `status` in the report says whether the build is done, partial (an
    answer or verdict failed: the same command tries again) or waiting (for people).
    """
    since = time.perf_counter()
    plan = check_plan(cfg)
    report = _build_from_votes(plan) if plan.build.votes else _build_from_prompts(plan)
    report["seconds"] = round(time.perf_counter() - since, 1)
    write_json(Path(report["folder"]) / "build_report.json", redact(report))
    return report


def check_plan(cfg: DictConfig) -> Plan:
    """The parts of `cfg` that a build needs, typed. ConfigError lists every fault."""
    try:
        values = {name: OmegaConf.to_container(cfg[name], resolve=True, throw_on_missing=True) for name in PARTS}
    except OmegaConfBaseException as error:
        raise explain(error) from error
    try:
        plan = Plan(seed=cfg.seed, out=cfg.out, **values)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_describe(fault) for fault in error.errors())) from error
    refuse_unready(plan)
    return plan


def refuse_unready(plan: Plan) -> None:
    """ConfigError for models and files that are not there."""
    build = plan.build
    faults = [*model_faults(plan.model), *judge_faults(plan.judge)]
    faults += data_faults(plan.data) if build.prompts is None and build.votes is None else []
    for source in build.answers:
        if isinstance(source, LocalAnswers) and is_local(source.path) and not Path(source.path).expanduser().exists():
            faults.append(f"build.answers: path={source.path} does not exist: name a folder with a model, or a hub id")
    for name in ("prompts", "votes"):
        faults += file_faults(f"build.{name}", named) if (named := getattr(build, name)) and is_local(named) else []
    if faults:
        raise ConfigError("\n".join(faults))


PARTS = ("model", "data", "judge", "build")


def _describe(fault: Any) -> str:
    kinds = ("gold", "reward_model", "llm", "human", "local", "server")
    place = [str(part) for part in fault["loc"] if part not in kinds]
    if fault["type"] == "extra_forbidden":
        return unknown_key(".".join(place), _known())
    return f"{'.'.join(place)}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r:.80}"


def _known() -> list[str]:
    from dpo_kit.config.settings import GoldJudge, HumanJudge, RewardModelJudge, ServerAnswers

    judges = {name for kind in (GoldJudge, RewardModelJudge, LLMJudge, HumanJudge) for name in kind.model_fields}
    answers = {*LocalAnswers.model_fields, *ServerAnswers.model_fields}
    return [
        *(f"build.{name}" for name in Build.model_fields),
        *(f"judge.{name}" for name in sorted(judges)),
        *(f"build.answers.{name}" for name in sorted(answers)),
        *(f"data.{name}" for name in Data.model_fields),
    ]


# --- from prompts ------------------------------------------------------------------------------------------------


def _build_from_prompts(plan: Plan) -> dict[str, Any]:
    prompts = read_prompts(plan.build.prompts, plan.data, plan.build.limit)
    identity = _identity(plan, prompts)
    folder = Path(plan.out or f"outputs/build-{key_of(identity)[:8]}")
    if not (folder / "answers.jsonl").exists():  # else all may have been answered
        for key, asked in (("judge", plan.judge), *(("build.answers", source) for source in plan.build.answers)):
            if isinstance(asked, Endpoint):
                refuse_silent(key, asked)
    with Journal(folder / "answers.jsonl") as journal:
        claim(folder, identity)
        answers, spend = _draw(plan, prompts.prompts, journal)
        with open_judge(plan.judge, folder, plan.seed) as judge:
            controls = _controls(plan.judge, judge, prompts.prompts, answers)
            paired = pair_answers(judge, prompts.prompts, answers, plan.build, plan.seed)
            report = _report(plan, prompts, answers, paired) | {"folder": str(folder), "controls": controls}
            report["judge"] = {"name": judge.name, **summarize_verdicts([c.verdict for c in paired.comparisons])}
            report["spend"] = {"answers": spend, "judge": judge.spend()}
        report["review"] = _review(folder, plan, paired.comparisons)
        write_jsonl(folder / "comparisons.jsonl", map(_comparison_line, paired.comparisons))
        write_jsonl(folder / "pairs.jsonl", paired.pairs)
    return report


def _identity(plan: Plan, prompts: Prompts) -> dict[str, Any]:
    """All that the pairs depend on; what only changes speed or cost is left out."""
    sources = []
    for source in plan.build.answers:
        values = source.model_dump(exclude=set(COST_ONLY))
        if isinstance(source, LocalAnswers):  # weights are known by their content, wherever they lie
            values["path"] = hash_weights(source.path) or source.path
        sources.append(values)
    return redact(
        {
            "seed": plan.seed,
            "build": plan.build.model_dump(exclude=set(NO_PART_OF_IT)) | {"answers": sources},
            "judge": judge_identity(plan.judge),
            "prompts": {"count": len(prompts.prompts), "content": key_of(prompts.prompts)},
        }
    )


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Note in `folder` what is built there. ConfigError, with the differing keys, where it is something else."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        write_json(manifest, identity)
        return
    was, now = dict(_flat(read_json(manifest))), dict(_flat(identity))
    if differing := [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]:
        said = "\n".join(f"  {key}: {was.get(key)!r} there, {now.get(key)!r} now" for key in differing)
        raise ConfigError(f"out={folder} holds another build:\n{said}\ntake another out=, or that config")


def _flat(value: Any, place: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in _flat(item, f"{place}.{key}" if place else str(key))]
    return [(place, value)]


def _draw(plan: Plan, prompts: Sequence[Any], journal: Journal) -> tuple[Given, list[dict[str, Any]]]:
    """For each prompt the answers of all sources, and what each server cost."""
    asking = Asking(plan.build.max_new_tokens, plan.build.chunk, plan.seed)
    drawn = [draw_answers(source, plan.model, prompts, asking, journal) for source in plan.build.answers]
    by_prompt = zip(*(answers for answers, _ in drawn), strict=True)
    return [[answer for own in each for answer in own] for each in by_prompt], [cost for _, cost in drawn if cost]


def _controls(settings: JudgeSettings, judge: Judge, prompts: Sequence[Any], answers: Given) -> list[dict[str, Any]]:
    """How a language model as judge does on the controls; empty for other judges."""
    if not isinstance(settings, LLMJudge):
        return []
    usable = [(p, a) for p, given in zip(prompts, answers, strict=True) if len(a := different(given)) > 1]
    some = usable[: settings.controls]
    if not some:
        return []
    firsts, seconds = ([a[place].text for _, a in some] for place in (0, 1))
    return run_controls(judge, [p for p, _ in some], firsts, seconds)


def _review(folder: Path, plan: Plan, comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """The judge checked by people: a sheet is written when `build.review` asks for one, and read once there is one."""
    sheet = ReviewSheet(folder / "review.csv", seed=plan.seed)
    judged = [each for each in comparisons if each.verdict.outcome != "unjudged"]
    if plan.judge.kind == "human" or not (plan.build.review or sheet.copies):
        return None
    some = sorted(judged, key=lambda c: key_of(plan.seed, c.prompt, c.a.text, c.b.text))[: plan.build.review]
    if not sheet.copies:
        sheet.write(_shown(each) for each in some)
    raw = {"win": "first", "loss": "second"}
    verdicts = [raw.get(each.verdict.outcome, "tie") for each in judged]
    return {"sheet": str(sheet.path), **sheet.agreement([_shown(each) for each in judged], verdicts)}  # type: ignore[arg-type]


def _shown(compared: Comparison) -> Shown:
    return Shown(compared.prompt, compared.a.text, compared.b.text)


def _comparison_line(compared: Comparison) -> dict[str, Any]:
    return {
        "prompt": compared.prompt,
        "a": compared.a.text,
        "b": compared.b.text,
        "source_a": compared.a.source,
        "source_b": compared.b.source,
        **dataclasses.asdict(compared.verdict),
    }


def _report(plan: Plan, prompts: Prompts, answers: Given, paired: Paired) -> dict[str, Any]:
    given = [answer for each in answers for answer in each]
    there = [answer for answer in given if answer is not None]
    sides = {name: Counter(pair[f"source_{name}"] for pair in paired.pairs) for name in ("chosen", "rejected")}
    return {
        "status": _status(plan, complete=len(there) == len(given), failed=paired.outcomes["failed"]),
        "prompts": {"in": len(prompts.prompts), **{name: paired.outcomes[name] for name in OUTCOMES}},
        "rows_left_out": prompts.left_out,
        "pairs": len(paired.pairs),
        "coins": dict(paired.coins),
        "answers": {
            "wanted": len(given),
            "there": len(there),
            "empty": sum(not answer.text.strip() for answer in there),
            "cut": sum(answer.cut for answer in there),
        },
        "sources": {
            name: {"answers": count, **{side: sides[side][name] for side in sides}}
            for name, count in Counter(answer.source for answer in there).items()
        },
    }


def _status(plan: Plan, *, complete: bool, failed: int) -> str:
    if not failed:
        return "done"
    return "waiting" if complete and plan.judge.kind == "human" else "partial"


# --- from votes --------------------------------------------------------------------------------------------------


def _build_from_votes(plan: Plan) -> dict[str, Any]:
    votes = str(plan.build.votes)
    pairs, report = pair_by_votes(votes, plan.data)
    folder = Path(plan.out or f"outputs/build-{key_of(votes, pairs)[:8]}")
    claim(folder, {"votes": key_of(pairs)})
    write_jsonl(folder / "pairs.jsonl", pairs)
    return {"status": "done", "folder": str(folder), "pairs": len(pairs), **report}


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
    table = Table(box=None, show_header=False)
    for name, value in _lines(report):
        table.add_row(name, escape(value))
    console.print(table)
    pairs = Path(report["folder"]) / "pairs.jsonl"
    if report["status"] == "waiting":
        sheet = Path(report["folder"]) / "review*.csv"
        console.print(
            f"next: fill in the column better of {sheet} (1, 2 or tie), then the same command",
            soft_wrap=True,
            markup=False,
        )
    elif report["pairs"]:
        console.print(f"next: {training(words, pairs)}", soft_wrap=True, markup=False)
    if report["status"] == "partial":
        raise BuildError(_what_is_missing(report))


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    counted = report.get("prompts") or report["items"]
    outcomes = ", ".join(f"{count} {name}" for name, count in counted.items() if count and name != "in")
    lines = [("prompts" if "prompts" in report else "items", f"{counted['in']} = {outcomes}")]
    lines.append(("pairs", str(report["pairs"])))
    if judge := report.get("judge"):
        lines.append(("judge", judge["name"]))
        shares = {
            "orders agree": "order_agreement",
            "first place": "first_position_rate",
            "unparsable": "unparsable_rate",
        }
        said = [f"{name} {judge[key]:.0%}" for name, key in shares.items() if judge[key] is not None]
        lines.append(("", ", ".join(said)))
    if agreement := report.get("agreement"):
        alpha = agreement["krippendorff_alpha"]
        lines.append(("raters", f"{agreement['raters']}, alpha {'undefined' if alpha is None else f'{alpha:.3f}'}"))
    if review := report.get("review"):
        same = "" if review["same_verdict"] is None else f", {review['same_verdict']:.0%} as the judge"
        lines.append(("checked by people", f"{review['checked']}{same} ({review['sheet']})"))
    lines += [("cost", f"{each['cost']:.4g} ({each['replies']} replies of {each['model']})") for each in _spent(report)]
    return lines


def _spent(report: dict[str, Any]) -> list[dict[str, Any]]:
    spend = report.get("spend") or {"answers": [], "judge": {}}
    return [each for each in (*spend["answers"], spend["judge"]) if "cost" in each]


def _what_is_missing(report: dict[str, Any]) -> str:
    reasons: Counter[str] = Counter()
    for each in _spent(report):
        reasons.update(each["failed"])
    why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    failed = report["prompts"]["failed"]
    return (
        f"{failed} of {report['prompts']['in']} prompts lack an answer or a verdict ({why}); what is there is in "
        f"{report['folder']}/pairs.jsonl, and the same command asks for the rest"
    )
