"""Warnings: what was found, why it matters, what to do. Thresholds stand beside their reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dpo_kit.data.report.figures import ENOUGH
from dpo_kit.data.rows import Kind

SHORTCUT = 0.6  # accuracy of a rule from which on it may be what is learned; below 1 - SHORTCUT likewise
NOISE = 0.25  # share of votes against the labels
CUT = 0.05  # share of rows that lose the end of an answer
ONE_SOURCE = 0.8
ONE_CLUSTER = 0.2
CURATE = "python -m dpo_kit data mode=curate"


@dataclass(frozen=True)
class Warn:
    """One finding: `about` is the report's key."""

    about: str
    what: str
    why: str
    do: str


OTHER_TOKENS = Warn(
    "tokens",
    "lengths are in tokens of the embedded model, and its trl.max_length is short",
    "rows may be left out or cut that another model has room for",
    "add model=local model.path=…",
)


def advise(report: dict[str, Any], wanted: Kind | None) -> list[dict[str, str]]:
    """All warnings on `report`, the most costly first. `wanted` is the kind of rows that the method trains on."""
    return [asdict(warning) for warning in (*_on_rows(report, wanted), *_on_labels(report), *_on_mixture(report))]


def _on_rows(report: dict[str, Any], wanted: Kind | None) -> Iterator[Warn]:
    if report["kind"] == "unary" and wanted == "pairs":
        yield Warn(
            "kind",
            "the rows have completion and label, the method takes pairs",
            "training would refuse them",
            "method=kto, or python -m dpo_kit data mode=convert convert.to=pairs",
        )
    if parts := report["unused_parts_of_prompts"]:
        yield Warn(
            "unused_columns",
            f"columns that look like a part of the prompt and are not trained on: {', '.join(parts)}",
            "answers are then trained on for questions that were never asked so",
            "write them into the column prompt, or take them away",
        )
    if report.get("answers_end_in", "") is None:
        yield Warn(
            "answers_end_in",
            "the chat template writes no token that ends an answer",
            "the model never learns to stop",
            "take a template that writes {{ eos_token }} after what the assistant says: model.chat_template=FILE",
        )
    dropped = {name: n for name, n in report["dropped_by_reason"].items() if name != "prompt is held out"}
    if dropped:
        yield Warn(
            "dropped_by_reason",
            f"{sum(dropped.values())} of {report['rows_read']} rows are left out",
            "malformed rows teach what they happen to hold, rows without signal nothing",
            "see dropped_rows.jsonl for places and remedies",
        )
    exact = report["contradictions"]["rows"]
    near = report.get("near_contradictions", {}).get("rows", 0)
    if exact + near:
        yield Warn(
            "contradictions",
            f"{exact + near} rows contradict another one (the same two answers, the other label; {near} nearly so)",
            "their gradients cancel; if they are slips, as many again may stand where no twin shows them",
            f"look at the places in the report; {CURATE} drops them",
        )
    if leaks := report["leaks"]["rows"]:
        yield Warn(
            "leaks",
            f"rows to train on with a held-out prompt, or nearly: {leaks}",
            "held-out accuracy then measures memory",
            f"name the held-out rows with data.eval; {CURATE} then drops them from train",
        )
    if leaks := report["benchmark"]["rows"]:
        yield Warn(
            "benchmark",
            f"rows to train on with a prompt of data.benchmark: {leaks}",
            "the benchmark's score will be too good to be true",
            f"{CURATE} data.benchmark=FILE drops them",
        )


def _on_labels(report: dict[str, Any]) -> Iterator[Warn]:
    for name, rule in report.get("shortcuts", {}).items():
        worse = rule["high"] < 1 - SHORTCUT
        if name != "longer (characters)" and (rule["low"] > SHORTCUT or worse):  # length is told by the tokens
            right = 1 - rule["accuracy"] if worse else rule["accuracy"]
            yield Warn(
                "shortcuts",
                f"the rule “{'not ' if worse else ''}{name}” alone names the chosen answer in {right:.0%} of the pairs",
                "a policy can learn this instead of what was meant: accuracy rises, answers do not get better",
                f"{CURATE} curate.balance_length=true" if "longer" in name else "add pairs in which it does not hold",
            )
    raters = report["agreement"]
    if raters and raters["noise"] > NOISE:
        yield Warn(
            "agreement",
            f"{raters['noise']:.0%} of the votes are against the label",
            f"no policy can be expected to reach more than {raters['mean']:.2f} of agreement with such raters",
            f"{CURATE} curate.min_agreement=0.7, or method=robust trl.label_smoothing={min(raters['noise'], 0.45):.2f}",
        )
    scores = report["scores"]
    if scores and scores["ties"] + scores["reversed"] > 0.02:
        yield Warn(
            "scores",
            f"{scores['reversed']:.0%} of the pairs rate the rejected answer higher, {scores['ties']:.0%} both alike",
            "label and rating contradict each other: one of them is wrong",
            f"{CURATE} curate.min_gap=0 drops both",
        )


def _on_mixture(report: dict[str, Any]) -> Iterator[Warn]:
    rows = report["rows_read"] - report["rows"]["dropped"]
    copies = report["copies"]["rows"] + report.get("near_duplicates", {}).get("rows", 0)
    if copies > 0.01 * report["rows_read"]:
        yield Warn(
            "copies",
            f"{copies} rows are copies of another one, or nearly",
            "they count as often as they stand there, and one epoch is several for them",
            f"{CURATE} keeps one of each",
        )
    diversity = report.get("diversity")
    if diversity and diversity["largest"] and diversity["largest_cluster"] > ONE_CLUSTER:
        pattern = diversity["largest"][0][0]
        yield Warn(
            "diversity",
            f"{diversity['largest_cluster']:.0%} of the rows have prompts of one pattern: “{pattern}”",
            "what is learned on one kind of prompt need not show on others",
            "add other prompts, or cap a source with curate.per_source",
        )
    if report["cut_at_max_length"] > CUT * rows:
        yield Warn(
            "cut_at_max_length",
            f"answers whose end trl.max_length={report['max_length']} cuts: in {report['cut_at_max_length']} rows",
            "the longer answer is judged without its end and never learns to stop",
            "raise trl.max_length, or leave out what is longer",
        )
    for name, (low, high) in report.get("classes", {}).get("weights", {}).items():
        other = {"desirable_weight": "undesirable_weight"}.get(name, "desirable_weight")
        if low > 1:
            yield Warn(
                "classes",
                f"{report['classes']['desirable']} thumbs up, {report['classes']['undesirable']} down",
                "the larger class outweighs the other: KTO's authors keep n·w of up to down within 1:1 and 4:3",
                "nothing where trl.desirable_weight=null, the default, makes both weigh the same; by hand "
                f"trl.{other}=1 and trl.{name} from {low:.2f} to {high:.2f}",
            )
    for column, values in report["balance"].items():
        name, count = next(iter(values["largest"].items()))
        share = count / rows
        if values["values"] > 1 and share > ONE_SOURCE:
            yield Warn(
                "balance",
                f"{share:.0%} of the rows have {column}={name}",
                "the others hardly count",
                f"{CURATE} curate.source={column} curate.per_source={max(1, count // 2)}",
            )
    if report["rows"]["train"] < ENOUGH:
        yield Warn(
            "size",
            f"{report['rows']['train']} rows to train on",
            "5,000 can do, 10,000 to 100,000 are usual; with fewer, intervals of held-out measures are wide",
            "go on for a first look; add data before you compare methods",
        )
