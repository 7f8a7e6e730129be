"""From sources to what trains and what is held out: normal rows, splits by prompt, every dropped row counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.config.settings import Data
from dpo_kit.data.fresh import as_prompts, distinct_prompts
from dpo_kit.data.gather import Gathered, count_faults, gather, sources
from dpo_kit.data.interleave import interleave, unpair
from dpo_kit.data.read import Fault
from dpo_kit.data.report.inspect import inspect
from dpo_kit.data.rows import ANSWERS, Kind, Rows, identify
from dpo_kit.errors import DataError


@dataclass
class Prepared:
    """Rows ready to train on and to measure with; the three splits share no prompt."""

    kind: Kind  # of the held-out rows
    train: Rows  # in the method's form and, for unary ones, in training order
    select: Rows  # for checkpoints and choices
    test: Rows  # reported once
    report: dict[str, Any]
    dropped: list[Fault] = field(default_factory=list)


def prepare(
    data: Data,
    *,
    wanted: Kind,
    tokenizer: Any,
    max_length: int | None,
    truncation: str,
    seed: int,
    fresh_tokens: int = 0,
    trains: bool = True,
) -> Prepared:
    """Read, check, split, and bring into the form that the method trains on.

    `wanted`: the form of the method's rows; pairs are split for a unary method, never the other way, and prompts are
    taken from rows of any kind. `fresh_tokens`: of an answer that is drawn to a prompt, at most. `trains=False`: nobody
    trains, so that held-out rows suffice. Raises DataError.
    """
    gathered = gather(data, tokenizer, bare=wanted == "prompts")
    kind, faults = gathered.kind, gathered.faults
    if kind == "unary" and wanted == "pairs":
        raise DataError("rows with completion and label train method=kto or method=kto_apo; this method needs pairs")
    train, pool = split(gathered, data, max_length, truncation, trains=trains)
    report = inspect(gathered, train, pool, wanted=wanted, max_length=max_length, benchmark=data.benchmark)
    select, test = _halves([gathered.shaped(row) for row in pool])
    if wanted == "prompts":
        train = [distinct_prompts(rows) for rows in train]
    weighed = [
        gathered.shaped(row)
        for rows, source in zip(train, sources(data.train), strict=True)
        for row in _weigh(rows, source.weight)
    ]
    if wanted == "prompts":
        weighed = as_prompts(weighed, tokenizer, max_length and max_length - fresh_tokens, faults)
        if not weighed:
            raise DataError(f"no prompt is left to answer: {count_faults(faults)}")
        report["dropped_by_reason"] = dict(Counter(fault.reason for fault in faults).most_common())
    splits = {"train": weighed, "select": select, "test": test}  # sources taken by their weight
    report["rows"] = {name: len(part) for name, part in splits.items()} | {"dropped": len(faults)}
    report["prompts"] = {name: len({row["prompt_id"] for row in part}) for name, part in splits.items()}
    trained = list(identify(weighed, "prompts" if wanted == "prompts" else kind))
    if wanted == "unary":
        trained = interleave(unpair(trained) if kind == "pairs" else trained, seed)
    return Prepared(kind, trained, list(identify(select, kind)), list(identify(test, kind)), report, faults)


def split(
    gathered: Gathered, data: Data, max_length: int | None, truncation: str, *, trains: bool = True
) -> tuple[list[Rows], Rows]:
    """The rows that can move a weight: those to train on by source, and the held-out ones, which have no prompt in
    common: it is taken, or dropped, from those to train on. Raises DataError.

    What is left out on the way is added to `gathered.faults`. Rows stay as they stand in their sources.
    """
    kind, faults = gathered.kind, gathered.faults
    train = [keep_signal(rows, kind, max_length, truncation, faults) for rows in gathered.train]
    pool = keep_signal(gathered.held_out or [], kind, max_length, truncation, faults)
    if trains and not any(train):
        raise DataError(f"all {gathered.read} rows are dropped: {count_faults(faults)}")
    every = [row for rows in train for row in rows]
    if gathered.held_out is not None:
        held = {row["prompt_id"] for row in pool}
        leaks = [row for row in every if row["prompt_id"] in held]
        remedy = "it stays in eval only"
        faults += [Fault(row["_place"], "prompt is held out", "in train and eval", remedy) for row in leaks]
    else:
        prompts = sorted({row["prompt_id"] for row in every})
        held = set(prompts[: max(2, round(data.holdout * len(prompts)))])
        pool = [row for row in every if row["prompt_id"] in held]
    train = [[row for row in rows if row["prompt_id"] not in held] for rows in train]
    every = [row for rows in train for row in rows]
    if (trains and not every) or len(held) < 2:
        trained = len({row["prompt_id"] for row in every})
        reasons = Counter(f"{fault.reason}, {fault.remedy}" for fault in faults).most_common(3)
        lost = "; ".join(f"{count} rows: {reason}" for reason, count in reasons)
        raise DataError(
            f"too few different prompts to train on ({trained}) and to hold some out ({len(held)}): at least 3 are "
            f"needed, 1 and 2 of them; {f'dropped were {lost}' if lost else 'add rows'}, or name held-out ones with "
            "data.eval"
        )
    if kind == "unary" and len(labels := {row["label"] for row in every}) == 1:
        (only,) = labels
        raise DataError(
            f"every label to train on is {str(only).lower()}, from {every[0]['_place']} on: KTO learns from the "
            f"difference between the two classes, so add rows with label {str(not only).lower()}"
        )
    return train, pool


def keep_signal(rows: Rows, kind: Kind, max_length: int | None, truncation: str, faults: list[Fault]) -> Rows:
    """The rows that can move a weight, each with `tokens` (counts, and whether an answer is cut); the others are added
    to `faults`.
    """
    from dpo_kit.model.tokens import truncate_both

    kept = []
    for row in rows:
        prompt, *answers = (row["ids"][name].tolist() for name in ("prompt", *ANSWERS[kind]))
        cut = [truncate_both(prompt, answer, max_length, truncation)[1] for answer in answers]
        reason, remedy = None, "dropped always: such a row has no gradient"
        if not all(cut):
            reason, remedy = "prompt fills max_length", "raise trl.max_length"
        elif kind == "pairs" and answers[0] == answers[1]:
            reason = "chosen and rejected are identical"
        elif kind == "pairs" and cut[0] == cut[1]:
            reason = "identical after truncation to max_length"
        if reason:
            faults.append(Fault(row["_place"], reason, f"{len(prompt)} prompt tokens", remedy))
        else:
            lengths = {"prompt": len(prompt), **{k: len(ids) for k, ids in zip(ANSWERS[kind], answers, strict=True)}}
            row["tokens"] = lengths | {"cut": cut != answers}
            kept.append(row)
    return kept


def _halves(pool: Rows) -> tuple[Rows, Rows]:
    """Two halves by prompt, each with one row of every prompt before any prompt's second."""
    half = {key: index % 2 for index, key in enumerate(sorted({row["prompt_id"] for row in pool}))}
    seen: Counter[str] = Counter()
    turns = []
    for row in pool:
        turns.append((seen[row["prompt_id"]], row["prompt_id"]))
        seen[row["prompt_id"]] += 1
    halves: tuple[Rows, Rows] = ([], [])
    for index in sorted(range(len(pool)), key=turns.__getitem__):
        halves[half[pool[index]["prompt_id"]]].append(pool[index])
    return halves


def _weigh(rows: Rows, weight: float) -> Rows:
    """`rows` as often as `weight` says; of a fraction, the prompts that come first by hash."""
    prompts = sorted({row["prompt_id"] for row in rows}, reverse=True)
    part = set(prompts[: round((weight % 1) * len(prompts))])
    return rows * int(weight) + [row for row in rows if row["prompt_id"] in part]
