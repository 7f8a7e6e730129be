"""The report on a data set: every figure by name, and warnings that say why they matter and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from dpo_kit.data.gather import Gathered
from dpo_kit.data.report import figures
from dpo_kit.data.report.advice import advise
from dpo_kit.data.report.duplicates import NEAR, content_keys, find_copies, find_near, jaccard, rank, sketch
from dpo_kit.data.report.figures import ENOUGH, USUAL
from dpo_kit.data.report.leaks import cluster_prompts, find_leaks, group_by_prompt, held_prompts, read_benchmark
from dpo_kit.data.report.shortcuts import edge_cases, measure_shortcuts
from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.model.chats import text_of

SHOWN = 20  # places listed of each finding
SAMPLE = 2000  # pairs whose two answers are compared with each other


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
    copies = find_copies(rows, kind, keys, order)
    contradicting = [index for group in copies.contradictions for index in group]
    values = sketch(rows, kind) if thorough else None
    prompts = None if values is None else values.prompts[: len(train)]
    report: dict[str, Any] = {
        "copies": _placed(rows, copies.first),
        "contradictions": _placed(rows, contradicting) | {"comparisons": len(copies.contradictions)},
    }
    for name, held in shared.items():
        report[name] = _placed(train, find_leaks(train, held, prompts)) | {"prompts": len(held)}
    if values is not None:
        near = find_near(rows, kind, values.rows, [index for index in order if index not in copies.first])
        crossed = {index for pair in near.contradictions for index in pair} - {*copies.first, *contradicting}
        report["near_duplicates"] = _placed(rows, near.leader) | {"comparisons_left_out": near.left_out}
        report["near_contradictions"] = _placed(rows, crossed)
        report["diversity"] = _diversity(rows, values.prompts)
        report["difficulty"] = _difficulty(rows, kind)
    return report


def _placed(rows: Rows, indices: Collection[int]) -> dict[str, Any]:
    """How many rows are meant, and where the first of them stand."""
    return {"rows": len(indices), "places": [rows[index]["_place"] for index in sorted(indices)[:SHOWN]]}


def _difficulty(rows: Rows, kind: Kind) -> dict[str, Any] | None:
    """How alike the two answers are (Jaccard index of their shingles) on a fixed sample: the more, the harder to tell
    apart. What the raters and the reference find hard stands under `agreement` and `reference`.
    """
    if kind != "pairs":
        return None
    sample = sorted(rows, key=lambda row: row["prompt_id"])[:SAMPLE]
    overlaps = [jaccard(text_of(row["chosen"]), text_of(row["rejected"])) for row in sample]
    return {
        "sampled": len(sample),
        "answers_overlap": figures.spread(overlaps),
        "nearly_alike": sum(overlap >= NEAR for overlap in overlaps) / len(overlaps),
    }


def _diversity(rows: Rows, values: np.ndarray) -> dict[str, Any]:
    """How different the prompts are: distinct ones, rows for each, clusters of alike ones with the largest."""
    texts, owners = group_by_prompt(rows)
    clusters: Counter[int] = Counter()
    for first, indices in zip(cluster_prompts(texts, values[[same[0] for same in owners]]), owners, strict=True):
        clusters[first] += len(indices)
    largest = clusters.most_common(5)
    return {
        "prompts": len(texts),
        "rows_of_the_most_used_prompt": max(map(len, owners)),
        "clusters": len(clusters),
        "largest_cluster": largest[0][1] / len(rows),
        "largest": [[texts[first][:80], count] for first, count in largest if count > 1],
        "opening_words": len({" ".join(text_of(text).lower().split()[:3]) for text in texts}),
    }
