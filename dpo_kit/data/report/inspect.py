"""The report on a data set: every figure by name, and warnings that say why they matter and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from dpo_kit.data.gather import Gathered
from dpo_kit.data.report import figures
from dpo_kit.data.report.advice import advise
from dpo_kit.data.report.duplicates import content_keys, find_copies, find_leaks, held_prompts, rank, read_benchmark
from dpo_kit.data.report.figures import ENOUGH, USUAL
from dpo_kit.data.report.text_rules import edge_cases, measure_shortcuts
from dpo_kit.data.rows import ANSWERS, Kind, Rows

SHOWN = 20  # places listed of each finding


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
        shortcuts = measure_shortcuts(every)
        report |= {"longer_is_chosen": shortcuts["longer (tokens)"]["accuracy"], "shortcuts": shortcuts}
    size = "few" if len(rows) < ENOUGH else "can do" if len(rows) < USUAL[0] else "usual"
    size = "many" if len(rows) > USUAL[1] else size
    edges = [edge_cases(row, ANSWERS[kind]) for row in every]
    by_kind = dict(Counter(name for names in edges for name in names).most_common())
    report |= {
        "size": {"rows": len(rows), "usual": list(USUAL), "can_do": ENOUGH, "verdict": size},
        "agreement": figures.measure_agreement(every),
        "scores": figures.measure_scores(every),
        "balance": figures.measure_balance(every),
        "edge_cases": {"share": sum(map(bool, edges)) / len(every), "by_kind": by_kind},
    }
    shared = {
        "leaks": [*held, *held_prompts(held_out)],
        "benchmark": read_benchmark(benchmark) if benchmark else [],
    }
    report |= _repeats(rows, held_out, kind, shared, thorough=thorough)
    report["warnings"] = advise(report, wanted)
    return report


def _repeats(
    train: Rows, held_out: Rows, kind: Kind, shared: dict[str, list[str]], *, thorough: bool
) -> dict[str, Any]:
    """Copies, contradictions, leaks of each list in `shared`; near ones and clusters too where it is to be thorough."""
    rows = [*train, *held_out]
    keys = content_keys(rows, kind)
    order = rank(rows, keys)
    copies, contradictions = find_copies(rows, kind, keys, order)
    contradicting = [index for group in contradictions for index in group]
    report: dict[str, Any] = {
        "copies": _placed(rows, copies),
        "contradictions": _placed(rows, contradicting) | {"comparisons": len(contradictions)},
    }
    leaks = {name: find_leaks(train, prompts) for name, prompts in shared.items()}
    if thorough:
        from dpo_kit.data.report import near

        of_rows, of_prompts = near.sketch(rows, kind)
        for name, prompts in shared.items():
            leaks[name] = near.near_leaks(train, prompts, of_prompts[: len(train)]) | leaks[name]
        rest = [index for index in order if index not in copies]
        leader, pairs, left_out = near.find_near(rows, kind, of_rows, rest)
        crossed = {index for pair in pairs for index in pair} - {*copies, *contradicting}
        report["near_duplicates"] = _placed(rows, leader) | {"comparisons_left_out": left_out}
        report["near_contradictions"] = _placed(rows, crossed)
        report["diversity"] = near.measure_diversity(rows, of_prompts)
        report["difficulty"] = near.measure_difficulty(rows, kind)
    for name, prompts in shared.items():
        report[name] = _placed(train, leaks[name]) | {"prompts": len(prompts)}
    return report


def _placed(rows: Rows, indices: Collection[int]) -> dict[str, Any]:
    """How many rows are meant, and where the first of them stand."""
    return {"rows": len(indices), "places": [rows[index]["_place"] for index in sorted(indices)[:SHOWN]]}
