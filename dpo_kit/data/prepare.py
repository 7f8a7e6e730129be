"""From sources to what trains and what is held out: normal rows, splits by prompt, every dropped row counted."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.config.settings import Data
from dpo_kit.data.gather import Gathered, count_faults, gather, sources
from dpo_kit.data.read import Fault
from dpo_kit.data.report.inspect import inspect
from dpo_kit.data.rows import ANSWERS, Kind, Rows, identify
from dpo_kit.errors import DataError

NO_GRADIENT = "dropped always: such a row has no gradient"


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
        from dpo_kit.data.other_rows import as_prompts, distinct_prompts

        train = [distinct_prompts(rows) for rows in train]
    weighed = [
        gathered.shaped(row)
        for rows, source in zip(train, sources(data.train), strict=True)
        for row in _weigh(rows, source.weight)
    ]
    if wanted == "prompts":
        weighed = as_prompts(weighed, tokenizer, None if max_length is None else max_length - fresh_tokens, faults)
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
        from dpo_kit.data.other_rows import interleave, unpair

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
    every = [row for rows in train for row in rows]
    if trains and not every:
        raise DataError(f"all {gathered.read} rows are dropped: {count_faults(faults)}")
    held = {row["prompt_id"] for row in pool}
    if gathered.held_out is None:  # prompts by the order of their ids, which is that of a hash
        prompts = sorted({row["prompt_id"] for row in every})
        held = {*prompts[: max(2, round(data.holdout * len(prompts)))]}
        pool = [row for row in every if row["prompt_id"] in held]
    else:
        leaks = [row["_place"] for row in every if row["prompt_id"] in held]
        faults += [Fault(place, "prompt is held out", "in train and eval", "it stays in eval only") for place in leaks]
    train = [[row for row in rows if row["prompt_id"] not in held] for rows in train]
    every = [row for rows in train for row in rows]
    if (trains and not every) or len(held) < 2:
        reasons = Counter(f"{fault.reason}, {fault.remedy}" for fault in faults).most_common(3)
        lost = "; ".join(f"{count} rows: {reason}" for reason, count in reasons)
        trained, why = len({row["prompt_id"] for row in every}), f"dropped were {lost}" if lost else "add rows"
        few = f"too few different prompts to train on ({trained}) and to hold some out ({len(held)})"
        raise DataError(f"{few}: at least 3 are needed, 1 and 2 of them; {why}, or name held-out ones with data.eval")
    if kind == "unary" and len(labels := {row["label"] for row in every}) == 1:
        only, other = ("true", "false") if labels.pop() else ("false", "true")
        remedy = f"KTO learns from the difference between the two classes, so add rows with label {other}"
        raise DataError(f"every label to train on is {only}, from {every[0]['_place']} on: {remedy}")
    return train, pool


def keep_signal(rows: Rows, kind: Kind, max_length: int | None, truncation: str, faults: list[Fault]) -> Rows:
    """The rows that can move a weight, with `tokens` (counts; whether an answer is cut); the others go to `faults`."""
    from dpo_kit.model.tokens import Truncation

    kept, names, cut = [], ("prompt", *ANSWERS[kind]), Truncation(max_length, truncation).cut
    for row in rows:
        prompt, *answers = (row["ids"][name].tolist() for name in names)
        shortened = [cut(prompt, answer)[1] for answer in answers]
        useless = None
        if not all(shortened):
            useless = "prompt fills max_length", "raise trl.max_length"
        elif kind == "pairs" and answers[0] == answers[1]:
            useless = "chosen and rejected are identical", NO_GRADIENT
        elif kind == "pairs" and shortened[0] == shortened[1]:
            useless = "identical after truncation to max_length", NO_GRADIENT
        if useless:
            faults.append(Fault(row["_place"], useless[0], f"{len(prompt)} prompt tokens", useless[1]))
        else:
            lengths = {name: len(ids) for name, ids in zip(names, (prompt, *answers), strict=True)}
            kept.append(row)
            row["tokens"] = lengths | {"cut": shortened != answers}
    return kept


def _halves(pool: Rows) -> tuple[Rows, Rows]:
    """Two halves by prompt, each with one row of every prompt before any prompt's second."""
    by_prompt: dict[str, Rows] = defaultdict(list)
    for row in sorted(pool, key=lambda row: row["prompt_id"]):
        by_prompt[row["prompt_id"]].append(row)
    groups = list(by_prompt.values())
    return in_turns(groups[::2]), in_turns(groups[1::2])


def in_turns(groups: list[Rows]) -> Rows:
    """The first of every group, then the second ones, and so on."""
    rounds = max(map(len, groups), default=0)
    return [group[turn] for turn in range(rounds) for group in groups if turn < len(group)]


def _weigh(rows: Rows, weight: float) -> Rows:
    """`rows` as often as `weight` says; of a fraction, the prompts that come first by hash."""
    prompts = sorted({row["prompt_id"] for row in rows}, reverse=True)
    part = set(prompts[: round((weight % 1) * len(prompts))])
    return rows * int(weight) + [row for row in rows if row["prompt_id"] in part]
