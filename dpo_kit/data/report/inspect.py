"""The report on a data set: every figure by name, and warnings that say what was found, why it matters and what to do
(their words: inspect.yaml; when: here, thresholds beside their reason).
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from dpo_kit.data.gather import Gathered
from dpo_kit.data.report import figures
from dpo_kit.data.report.duplicates import find_copies, find_leaks, held_prompts, read_benchmark
from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.run.files import texts

SHOWN = 20  # places listed of each finding
ENOUGH, USUAL = 5_000, (10_000, 100_000)  # rows that preference tuning can do with, and those that it usually takes
SHORTCUT = 0.6  # accuracy of a rule from which on it may be what is learned; below 1 - SHORTCUT likewise
NOISE = 0.25  # share of votes against the labels
CUT = 0.05  # share of rows that lose the end of an answer
ONE_SOURCE = 0.8
ONE_CLUSTER = 0.2


def inspect(
    gathered: Gathered,
    train: list[Rows],
    held_out: Rows,
    *,
    wanted: Kind | None,
    max_length: int | None,
    benchmark: str | None = None,
    held: Sequence[str] = (),
    thorough: bool = False,
) -> dict[str, Any]:
    """The report, plain JSON values; shares are 0 to 1, lengths are tokens.

    `train` and `held_out` are what `split` gave; `held` are further prompts that must not be trained on. `thorough`
    adds near-duplicates, near leaks and clusters of prompts, which take some seconds for each 10,000 rows.
    """
    kind, rows = gathered.kind, [row for part in train for row in part]
    every = [*rows, *held_out]
    report: dict[str, Any] = {
        "kind": kind,
        "forms": gathered.forms,
        "rows_read": gathered.read,
        "rows": {"train": len(rows), "held_out": len(held_out), "dropped": len(gathered.faults)},
        "prompts": {
            name: len({row["prompt_id"] for row in part}) for name, part in (("train", rows), ("held_out", held_out))
        },
        "dropped_by_reason": dict(Counter(fault.reason for fault in gathered.faults).most_common()),
        **gathered.notes,
        "max_length": max_length,
        **figures.lengths(every, kind),
    }
    if kind == "unary":
        report |= {"desirable": sum(row["label"] for row in rows), "classes": figures.measure_classes(rows)}
    elif kind == "pairs":
        shortcuts = figures.measure_shortcuts(every)
        report |= {"longer_is_chosen": shortcuts["longer (tokens)"]["accuracy"], "shortcuts": shortcuts}
    levels = {"few": len(rows) < ENOUGH, "can do": len(rows) < USUAL[0], "many": len(rows) > USUAL[1], "usual": True}
    edges = [figures.edge_cases(row, ANSWERS[kind]) for row in every]
    by_kind = dict(Counter(name for names in edges for name in names).most_common())
    verdict = next(name for name, holds in levels.items() if holds)
    report |= {
        "size": {"rows": len(rows), "usual": list(USUAL), "can_do": ENOUGH, "verdict": verdict},
        "agreement": figures.measure_agreement(every),
        "scores": figures.measure_scores(every),
        "balance": figures.measure_balance(every),
        "edge_cases": {"share": sum(map(bool, edges)) / len(every), "by_kind": by_kind},
    }
    forbidden = {
        "leaks": [*held, *held_prompts(held_out)],
        "benchmark": read_benchmark(benchmark) if benchmark else [],
    }
    report |= _repeats(rows, held_out, kind, forbidden, thorough=thorough)
    report["warnings"] = list(advise(report, wanted))
    return report


def _repeats(
    train: Rows, held_out: Rows, kind: Kind, forbidden: dict[str, list[str]], *, thorough: bool
) -> dict[str, Any]:
    """Copies, contradictions, leaks of each list of `forbidden` prompts; if `thorough` near ones and clusters too."""
    rows = [*train, *held_out]
    order, copies, contradictions = find_copies(rows, kind)
    contradicting = [index for group in contradictions for index in group]
    report: dict[str, Any] = {
        "copies": _placed(rows, copies),
        "contradictions": _placed(rows, contradicting) | {"comparisons": len(contradictions)},
    }
    leaks = {name: find_leaks(train, prompts) for name, prompts in forbidden.items()}
    if thorough:
        from dpo_kit.data.report import near

        of_rows, of_prompts = near.sketch(rows, kind)
        for name, prompts in forbidden.items():
            leaks[name] = near.near_leaks(train, prompts, of_prompts[: len(train)]) | leaks[name]
        rest = [index for index in order if index not in copies]
        leader, pairs, left_out = near.find_near(rows, kind, of_rows, rest)
        crossed = {index for pair in pairs for index in pair} - {*copies, *contradicting}
        report["near_duplicates"] = _placed(rows, leader) | {"comparisons_left_out": left_out}
        report["near_contradictions"] = _placed(rows, crossed)
        report["diversity"] = near.measure_diversity(rows, of_prompts)
        report["difficulty"] = near.measure_difficulty(rows, kind)
    for name, prompts in forbidden.items():
        report[name] = _placed(train, leaks[name]) | {"prompts": len(prompts)}
    return report


def _placed(rows: Rows, indices: Collection[int]) -> dict[str, Any]:
    """How many rows are meant, and where the first of them stand."""
    return {"rows": len(indices), "places": [rows[index]["_place"] for index in sorted(indices)[:SHOWN]]}


def warn(warning: str, /, **values: Any) -> dict[str, str]:
    """The words of `warning`: {about: the report's key, what, why, do}."""
    return {part: text.format(**values) for part, text in texts(__file__)[warning].items()}


def advise(report: dict[str, Any], wanted: Kind | None) -> Iterator[dict[str, str]]:
    """All warnings on `report`, the most costly first. `wanted` is the kind of rows that the method trains on."""
    if report["kind"] == "unary" and wanted == "pairs":
        yield warn("unary")
    if parts := report["unused_parts_of_prompts"]:
        yield warn("unused parts", columns=", ".join(parts))
    if report.get("answers_end_in", "") is None:
        yield warn("no end")
    if dropped := sum(n for name, n in report["dropped_by_reason"].items() if name != "prompt is held out"):
        yield warn("dropped", count=dropped, read=report["rows_read"])
    near = report.get("near_contradictions", {}).get("rows", 0)
    if count := report["contradictions"]["rows"] + near:
        yield warn("contradictions", count=count, near=near)
    for name in ("leaks", "benchmark"):
        if count := report[name]["rows"]:
            yield warn(name, count=count)
    for name, rule in report.get("shortcuts", {}).items():
        worse = rule["high"] < 1 - SHORTCUT
        if name != "longer (characters)" and (rule["low"] > SHORTCUT or worse):  # length is told by the tokens
            right = 1 - rule["accuracy"] if worse else rule["accuracy"]
            told = "longer shortcut" if "longer" in name else "shortcut"
            yield warn(told, rule=f"{'not ' if worse else ''}{name}", right=right)
    if (raters := report["agreement"]) and raters["noise"] > NOISE:
        yield warn("noise", **raters, smoothing=min(raters["noise"], 0.45))
    if (scores := report["scores"]) and scores["ties"] + scores["reversed"] > 0.02:
        yield warn("ratings", **scores)
    copies = report["copies"]["rows"] + report.get("near_duplicates", {}).get("rows", 0)
    if copies > 0.01 * report["rows_read"]:
        yield warn("copies", count=copies)
    diversity = report.get("diversity")
    if diversity and diversity["largest"] and diversity["largest_cluster"] > ONE_CLUSTER:
        yield warn("one pattern", share=diversity["largest_cluster"], pattern=diversity["largest"][0][0])
    rows = report["rows_read"] - report["rows"]["dropped"]
    if report["cut_at_max_length"] > CUT * rows:
        yield warn("cut", limit=report["max_length"], count=report["cut_at_max_length"])
    for name, (low, high) in report.get("classes", {}).get("weights", {}).items():
        if low > 1:
            other = {"desirable_weight": "undesirable_weight"}.get(name, "desirable_weight")
            yield warn("classes", **report["classes"], name=name, other=other, low=low, high=high)
    for column, values in report["balance"].items():
        name, count = next(iter(values["largest"].items()))
        if values["values"] > 1 and count / rows > ONE_SOURCE:
            yield warn("one source", share=count / rows, column=column, name=name, most=max(1, count // 2))
    if report["rows"]["train"] < ENOUGH:
        yield warn("few rows", rows=report["rows"]["train"])
