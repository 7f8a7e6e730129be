"""From sources to what trains and what is held out: normal rows, splits by prompt, every dropped row counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from dpo_kit.config.settings import Data
from dpo_kit.data.gather import Gathered, count_faults, gather, sources
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
        from dpo_kit.data.fresh import as_prompts, distinct_prompts

        train = [distinct_prompts(rows) for rows in train]
    weighed = [
        gathered.shaped(row)
        for rows, source in zip(train, sources(data.train), strict=True)
        for row in _weigh(rows, source.weight)
    ]
    if wanted == "prompts":
        room = None if max_length is None else max_length - fresh_tokens
        weighed = as_prompts(weighed, tokenizer, room, faults)
        if not weighed:
            raise DataError(f"no prompt is left to answer: {count_faults(faults)}")
        report["rows"]["dropped"] = len(faults)
        report["dropped_by_reason"] = dict(Counter(fault.reason for fault in faults).most_common())
    used = {"train": weighed, "select": select, "test": test}  # sources taken by their weight
    report["used"] = {
        "rows": {name: len(part) for name, part in used.items()},
        "prompts": {name: len({row["prompt_id"] for row in part}) for name, part in used.items()},
    }
    trained = list(identify(weighed, "prompts" if wanted == "prompts" else kind))
    if wanted == "unary":
        from dpo_kit.data.interleave import interleave, unpair

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
    if gathered.held_out is None:
        pool = _hold_out(train, data.holdout)
    held = {row["prompt_id"] for row in pool}
    if gathered.held_out is not None:
        leaks = (row for rows in train for row in rows if row["prompt_id"] in held)
        remedy = "it stays in eval only"
        faults += [Fault(row["_place"], "prompt is held out", "in train and eval", remedy) for row in leaks]
    train = [[row for row in rows if row["prompt_id"] not in held] for rows in train]
    every = [row for rows in train for row in rows]
    if (trains and not every) or len(held) < 2:
        raise DataError(_too_few(len({row["prompt_id"] for row in every}), len(held), faults))
    if kind == "unary" and len(labels := {row["label"] for row in every}) == 1:
        (only,) = labels
        raise DataError(
            f"every label to train on is {str(only).lower()}, from {every[0]['_place']} on: KTO learns from the "
            f"difference between the two classes, so add rows with label {str(not only).lower()}"
        )
    return train, pool


def _hold_out(train: list[Rows], share: float) -> Rows:
    """The rows of a `share` of the prompts, two or more, by the order of their ids, which is that of a hash."""
    every = [row for rows in train for row in rows]
    prompts = sorted({row["prompt_id"] for row in every})
    held = set(prompts[: max(2, round(share * len(prompts)))])
    return [row for row in every if row["prompt_id"] in held]


def _too_few(trained: int, held: int, faults: list[Fault]) -> str:
    """Why so many prompts to train on and to hold out do not do, and where the others went."""
    reasons = Counter(f"{fault.reason}, {fault.remedy}" for fault in faults).most_common(3)
    lost = "; ".join(f"{count} rows: {reason}" for reason, count in reasons)
    return (
        f"too few different prompts to train on ({trained}) and to hold some out ({held}): at least 3 are "
        f"needed, 1 and 2 of them; {f'dropped were {lost}' if lost else 'add rows'}, or name held-out ones with "
        "data.eval"
    )


def keep_signal(rows: Rows, kind: Kind, max_length: int | None, truncation: str, faults: list[Fault]) -> Rows:
    """The rows that can move a weight, each with `tokens` (counts, and whether an answer is cut); the others are added
    to `faults`.
    """
    from dpo_kit.model.tokens import truncate_both

    kept = []
    for row in rows:
        prompt, *answers = (row["ids"][name].tolist() for name in ("prompt", *ANSWERS[kind]))
        shortened = [truncate_both(prompt, answer, max_length, truncation)[1] for answer in answers]
        if useless := _why_useless(answers, shortened):
            reason, remedy = useless
            faults.append(Fault(row["_place"], reason, f"{len(prompt)} prompt tokens", remedy))
        else:
            lengths = {"prompt": len(prompt), **{k: len(ids) for k, ids in zip(ANSWERS[kind], answers, strict=True)}}
            row["tokens"] = lengths | {"cut": shortened != answers}
            kept.append(row)
    return kept


NO_GRADIENT = "dropped always: such a row has no gradient"


def _why_useless(answers: list[list[int]], shortened: list[list[int]]) -> tuple[str, str] | None:
    """Reason and remedy where a row moves no weight, by the ids of its answers before and after truncation."""
    if not all(shortened):
        return "prompt fills max_length", "raise trl.max_length"
    if len(answers) == 2 and answers[0] == answers[1]:
        return "chosen and rejected are identical", NO_GRADIENT
    if len(answers) == 2 and shortened[0] == shortened[1]:
        return "identical after truncation to max_length", NO_GRADIENT
    return None


def _halves(pool: Rows) -> tuple[Rows, Rows]:
    """Two halves by prompt, each with one row of every prompt before any prompt's second."""
    half_of = {prompt: index % 2 for index, prompt in enumerate(sorted({row["prompt_id"] for row in pool}))}
    seen: Counter[str] = Counter()
    occurrences = []
    for row in pool:
        occurrences.append((seen[row["prompt_id"]], row["prompt_id"]))
        seen[row["prompt_id"]] += 1
    halves: tuple[Rows, Rows] = ([], [])
    for _, row in sorted(zip(occurrences, pool, strict=True), key=itemgetter(0)):
        halves[half_of[row["prompt_id"]]].append(row)
    return halves


def _weigh(rows: Rows, weight: float) -> Rows:
    """`rows` as often as `weight` says; of a fraction, the prompts that come first by hash."""
    prompts = sorted({row["prompt_id"] for row in rows}, reverse=True)
    part = set(prompts[: round((weight % 1) * len(prompts))])
    return rows * int(weight) + [row for row in rows if row["prompt_id"] in part]
