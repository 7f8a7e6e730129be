"""From sources to what trains and what is held out: normal rows, splits by prompt, every dropped row counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.config.settings import Data
from dpo_kit.data.fresh import as_prompts, distinct_prompts
from dpo_kit.data.gather import Gathered, Rows, count_faults, gather, sources
from dpo_kit.data.interleave import interleave, unpair
from dpo_kit.data.read import Fault
from dpo_kit.data.report.inspect import inspect
from dpo_kit.data.rows import Kind, identify
from dpo_kit.data.signal import keep_signal
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
    kind = gathered.kind
    if kind == "unary" and wanted == "pairs":
        raise DataError("rows with completion and label train method=kto or method=kto_apo; this method needs pairs")
    train, pool = split(gathered, data, max_length, truncation, trains=trains)
    report = inspect(gathered, train, pool, wanted=wanted, max_length=max_length, benchmark=data.benchmark)
    select, test = _halves([gathered.form(row) for row in pool])
    if wanted == "prompts":
        train = [distinct_prompts(rows) for rows in train]
    weighed = [
        gathered.form(row)
        for rows, source in zip(train, sources(data.train), strict=True)
        for row in _weigh(rows, source.weight)
    ]
    if wanted == "prompts":
        weighed = as_prompts(weighed, tokenizer, max_length and max_length - fresh_tokens, gathered.faults)
        _refuse_none(weighed, gathered.faults)
        report["dropped_by_reason"] = dict(Counter(fault.reason for fault in gathered.faults).most_common())
    report |= _sizes(gathered, train=weighed, select=select, test=test)
    trained = list(identify(weighed, "prompts" if wanted == "prompts" else kind))
    if wanted == "unary":
        trained = interleave(unpair(trained) if kind == "pairs" else trained, seed)
    return Prepared(kind, trained, list(identify(select, kind)), list(identify(test, kind)), report, gathered.faults)


def split(
    gathered: Gathered, data: Data, max_length: int | None, truncation: str, *, trains: bool = True
) -> tuple[list[Rows], Rows]:
    """The rows that can move a weight: those to train on by source, and the held-out ones. Raises DataError.

    What is left out on the way is added to `gathered.faults`. Rows stay as they stand in their sources.
    """

    def keep(rows: Rows) -> Rows:
        return keep_signal(rows, gathered.kind, max_length, truncation, gathered.faults)

    train = [keep(rows) for rows in gathered.train]
    pool = None if gathered.held_out is None else keep(gathered.held_out)
    if trains and not any(train):
        raise DataError(f"all {gathered.read} rows are dropped: {count_faults(gathered.faults)}")
    train, pool = _part(train, pool, data.holdout, gathered.faults, trains=trains)
    if gathered.kind == "unary" and any(train):
        _refuse_one_class([row for rows in train for row in rows])
    return train, pool


def _part(
    train: list[Rows], pool: Rows | None, share: float, faults: list[Fault], *, trains: bool
) -> tuple[list[Rows], Rows]:
    """Train and held-out rows without a common prompt: held-out prompts are taken, or dropped, from train."""
    if pool is not None:
        held = {row["prompt_id"] for row in pool}
        leaks = [row for rows in train for row in rows if row["prompt_id"] in held]
        faults += [
            Fault(row["_place"], "prompt is held out", "in train and eval", "it stays in eval only") for row in leaks
        ]
    else:
        prompts = sorted({row["prompt_id"] for rows in train for row in rows})
        held = set(prompts[: max(2, round(share * len(prompts)))])
        pool = [row for rows in train for row in rows if row["prompt_id"] in held]
    kept = [[row for row in rows if row["prompt_id"] not in held] for rows in train]
    if (trains and not any(kept)) or len(held) < 2:
        trained = len({row["prompt_id"] for rows in kept for row in rows})
        reasons = Counter(f"{fault.reason}, {fault.remedy}" for fault in faults).most_common(3)
        lost = "; ".join(f"{count} rows: {reason}" for reason, count in reasons)
        raise DataError(
            f"too few different prompts to train on ({trained}) and to hold some out ({len(held)}): at least 3 are "
            f"needed, 1 and 2 of them; {f'dropped were {lost}' if lost else 'add rows'}, or name held-out ones with "
            "data.eval"
        )
    return kept, pool


def _refuse_one_class(rows: Rows) -> None:
    only = rows[0]["label"]
    if all(row["label"] == only for row in rows):
        raise DataError(
            f"every label to train on is {str(only).lower()}, from {rows[0]['_place']} on: KTO learns from the "
            f"difference between the two classes, so add rows with label {str(not only).lower()}"
        )


def _refuse_none(prompts: Rows, faults: list[Fault]) -> None:
    if not prompts:
        raise DataError(f"no prompt is left to answer: {count_faults(faults)}")


def _halves(pool: Rows) -> tuple[Rows, Rows]:
    """Two halves by prompt, each with one row of every prompt before any prompt's second."""
    place = {key: index for index, key in enumerate(sorted({row["prompt_id"] for row in pool}))}
    halves: tuple[Rows, Rows] = ([], [])
    for row in _prompts_first(pool):
        halves[place[row["prompt_id"]] % 2].append(row)
    return halves


def _prompts_first(rows: Rows) -> Rows:
    seen: Counter[str] = Counter()
    turns = []
    for row in rows:
        turns.append((seen[row["prompt_id"]], row["prompt_id"]))
        seen[row["prompt_id"]] += 1
    return [rows[index] for index in sorted(range(len(rows)), key=turns.__getitem__)]


def _weigh(rows: Rows, weight: float) -> Rows:
    """`rows` as often as `weight` says; of a fraction, the prompts that come first by hash."""
    prompts = sorted({row["prompt_id"] for row in rows}, reverse=True)
    part = set(prompts[: round((weight % 1) * len(prompts))])
    return rows * int(weight) + [row for row in rows if row["prompt_id"] in part]


def _sizes(gathered: Gathered, **splits: Rows) -> dict[str, Any]:
    """How many rows and prompts are in each split, sources taken by their weight."""
    rows = {name: len(part) for name, part in splits.items()}
    return {
        "rows": rows | {"dropped": len(gathered.faults)},
        "prompts": {name: len({row["prompt_id"] for row in part}) for name, part in splits.items()},
    }
