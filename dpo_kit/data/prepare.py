"""From sources to what trains and what is held out: normal rows, splits by prompt, every dropped row counted."""

from __future__ import annotations

import difflib
import logging
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.data.interleave import interleave, unpair
from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.data.rows import ANSWERS, Kind, as_chat, digest, identify, normalise
from dpo_kit.errors import DataError
from dpo_kit.settings import Data, Source

log = logging.getLogger(__name__)
Rows = list[dict[str, Any]]


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
    data: Data, *, wanted: Kind, tokenizer: Any, max_length: int | None, truncation: str, seed: int
) -> Prepared:
    """Read, check, split, and bring into the form that the method trains on.

    `wanted`: the form of the method's rows; pairs are split for a unary method, never the other way. Raises DataError.
    """
    faults: list[Fault] = []
    sources = _sources(data.train)
    read = [_read(source.path, data.train_split, data, tokenizer, faults) for source in sources]
    held_out = [
        _read(source.path, data.eval_split or data.train_split, data, tokenizer, faults)
        for source in _eval_sources(data)
    ]
    _refuse_malformed(faults, data)
    kind = _one_kind([rows_kind for rows_kind, _ in (*read, *held_out)], wanted)
    control_tokens = _control_tokens([row for _, rows in (*read, *held_out) for row in rows], kind, tokenizer)
    train = [_signal(rows, kind, tokenizer, max_length, truncation, faults) for _, rows in read]
    pool = [row for _, rows in held_out for row in _signal(rows, kind, tokenizer, max_length, truncation, faults)]
    train, pool = _part(train, pool, data.holdout, faults, separate=bool(held_out))
    select, test = _halves(pool)
    weighed = [row for rows, source in zip(train, sources, strict=True) for row in _weigh(rows, source.weight)]
    report = _report(weighed, select, test, kind, faults) | {"control_tokens": control_tokens}
    trained = list(identify(weighed, kind))
    if wanted == "unary":
        trained = interleave(unpair(trained) if kind == "pairs" else trained, seed)
    return Prepared(kind, trained, list(identify(select, kind)), list(identify(test, kind)), report, faults)


# --- reading -----------------------------------------------------------------------------------------------------


def _sources(spec: str | list[Source]) -> list[Source]:
    return [Source(path=spec)] if isinstance(spec, str) else spec


def _eval_sources(data: Data) -> list[Source]:
    if data.eval is not None:
        return _sources(data.eval)
    return _sources(data.train) if data.eval_split else []


def _read(path: str, split: str, data: Data, tokenizer: Any, faults: list[Fault]) -> tuple[Kind, Rows]:
    found = list(read_source(path, split))
    rows = [row for row in found if isinstance(row, Row)]
    faults += [fault for fault in found if isinstance(fault, Fault)]
    if not rows:
        raise DataError(f"{path} has no row to train on" + (f": {_show(faults[0])}" if faults else ""))
    kind = _kind(path, rows, data.columns)
    normal = [normalise(row, kind, data.columns) for row in rows]
    faults += [fault for fault in normal if isinstance(fault, Fault)]
    return kind, _in_one_form(
        path, [row.values | {"_place": row.place} for row in normal if isinstance(row, Row)], kind, data, tokenizer
    )


def _kind(path: str, rows: list[Row], columns: dict[str, str]) -> Kind:
    """Pairs or unary rows, by the columns that any row has."""
    names = {name for row in rows for name in row.values}
    for mine, theirs in columns.items():
        if theirs not in names:
            near = difflib.get_close_matches(theirs, names, n=1) or sorted(names)
            raise DataError(f"{path} has no column {theirs!r} (data.columns.{mine}); it has {', '.join(near)}")
    ours = names | {mine for mine, theirs in columns.items() if theirs in names}
    if {"chosen", "rejected"} <= ours:
        return "pairs"
    if {"prompt", "completion", "label"} <= ours:
        return "unary"
    wanted = ("prompt", "chosen", "rejected", "completion", "label")
    hints = {w: difflib.get_close_matches(w, names - set(wanted), n=1) for w in wanted if w not in ours}
    hint = ", ".join(f"{w}: {near[0]}" for w, near in hints.items() if near)
    raise DataError(
        f"{path} has the columns {', '.join(sorted(names))}; needed are prompt, chosen, rejected (pairs) or prompt, "
        f"completion, label (unary): map them with data.columns={{{hint or 'chosen: …, rejected: …'}}}"
    )


def _in_one_form(path: str, rows: Rows, kind: Kind, data: Data, tokenizer: Any) -> Rows:
    wrap = tokenizer.chat_template is not None if data.wrap_as_chat == "auto" else data.wrap_as_chat
    rows = [as_chat(row, kind) for row in rows] if wrap else rows
    forms = {isinstance(row["prompt"], str) for row in rows}
    if len(forms) > 1:
        raise DataError(f"{path} mixes text rows and chat rows: data.wrap_as_chat=true makes one of both")
    if forms == {False} and tokenizer.chat_template is None:
        raise DataError(f"{path} has chat messages, but the tokenizer has no chat template: use an instruct model")
    return rows


def _refuse_malformed(faults: list[Fault], data: Data) -> None:
    if faults and data.on_bad_row == "fail":
        first = "\n".join(f"  {_show(fault)}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{len(faults)} malformed rows:\n{first}{more}\nmend them, or leave them out with data.on_bad_row=drop"
        )


def _show(fault: Fault) -> str:
    return f"{fault.place}: {fault.reason} ({fault.found})"


def _one_kind(kinds: list[Kind], wanted: Kind) -> Kind:
    if len(set(kinds)) > 1:
        raise DataError("pairs and unary rows cannot be mixed in one run: convert one of the sources")
    if kinds[0] == "unary" and wanted == "pairs":
        raise DataError("rows with completion and label train method=kto or method=kto_apo; this method needs pairs")
    return kinds[0]


# --- what the text may do ----------------------------------------------------------------------------------------


def _control_tokens(rows: Rows, kind: Kind, tokenizer: Any) -> dict[str, Any]:
    """How many rows hold control tokens in their text, which ones, and how they are read; said in the log too.

    First the chat template is tried on the chats of all rows. ModelError where it is hostile.
    """
    from dpo_kit.control_tokens import count_control_tokens
    from dpo_kit.template import refuse_hostile_template

    chats = [row for row in rows if not isinstance(row["prompt"], str)]
    prompts = [(row["prompt"], True) for row in chats]
    wholes = [([*row["prompt"], *row[name]], False) for row in chats for name in ANSWERS[kind]]
    refuse_hostile_template(tokenizer, [*prompts, *wholes])
    counts = [count_control_tokens(tokenizer, _texts_of(row, kind, tokenizer.eos_token)) for row in rows]
    found: Counter[str] = sum(counts, Counter())
    rows_held, read_as = sum(map(bool, counts)), "text" if chats else "tokens"
    if found:
        log.warning(
            "%d rows hold control tokens in their text (%s); they are read as %s%s",
            *(rows_held, ", ".join(found), read_as),
            "" if chats else ", since raw text is taken as rendered already: for text as typed, data.wrap_as_chat=true",
        )
    return {"rows": rows_held, "tokens": dict(found), "read_as": read_as}


def _texts_of(row: dict[str, Any], kind: Kind, eos: str) -> list[Any]:
    """The texts of a row; of raw answers without the EOS that ends them."""
    answers = [row[name] for name in ANSWERS[kind]]
    return [row["prompt"], *(text.removesuffix(eos) if isinstance(text, str) else text for text in answers)]


# --- rows without signal -----------------------------------------------------------------------------------------


def _signal(
    rows: Rows, kind: Kind, tokenizer: Any, max_length: int | None, truncation: str, faults: list[Fault]
) -> Rows:
    """The rows that can move a weight, with their token counts; the others are counted as dropped."""
    from dpo_kit.tokens import encode_rows

    encoded = encode_rows(
        tokenizer, [row["prompt"] for row in rows], [[row[name] for name in ANSWERS[kind]] for row in rows]
    )
    kept = []
    for row, (prompt, answers) in zip(rows, encoded, strict=True):
        cut = [_cut(prompt, answer, max_length, truncation) for answer in answers]
        if reason := _no_signal(answers, cut):
            faults.append(Fault(row["_place"], reason, f"{len(prompt)} prompt tokens"))
        else:
            lengths = {"prompt": len(prompt), **{k: len(ids) for k, ids in zip(ANSWERS[kind], answers, strict=True)}}
            kept.append(row | {"tokens": lengths | {"cut": cut != answers}})
    return kept


def _cut(prompt: list[int], answer: list[int], max_length: int | None, truncation: str) -> list[int]:
    from dpo_kit.tokens import truncate

    return answer[-(max_length or 0) :] if truncation == "keep_end" else truncate(prompt, answer, max_length)


def _no_signal(answers: list[list[int]], cut: list[list[int]]) -> str | None:
    if not all(cut):
        return "prompt fills max_length"
    if len(answers) == 2 and answers[0] == answers[1]:
        return "chosen and rejected are identical"
    if len(cut) == 2 and cut[0] == cut[1]:
        return "identical after truncation to max_length"
    return None


# --- splits ------------------------------------------------------------------------------------------------------


def _part(
    train: list[Rows], pool: Rows, share: float, faults: list[Fault], *, separate: bool
) -> tuple[list[Rows], Rows]:
    """Train and held-out rows without a common prompt: held-out prompts are taken, or dropped, from train."""
    if separate:
        held = {_key(row) for row in pool}
        leaks = [row for rows in train for row in rows if _key(row) in held]
        faults += [Fault(row["_place"], "prompt is held out", "in train and eval") for row in leaks]
    else:
        prompts = sorted({_key(row) for rows in train for row in rows})
        held = set(prompts[: max(2, round(share * len(prompts)))])
        pool = [row for rows in train for row in rows if _key(row) in held]
    kept = [[row for row in rows if _key(row) not in held] for rows in train]
    if not any(kept) or len(held) < 2:
        raise DataError("too few different prompts to train on and to hold some out: at least 3 are needed")
    return kept, pool


def _key(row: dict[str, Any]) -> str:
    """A hash of the prompt that orders prompts at random, the same way on every machine and for every seed."""
    return digest(row["prompt"])


def _halves(pool: Rows) -> tuple[Rows, Rows]:
    """Two halves by prompt, each with one row of every prompt before any prompt's second."""
    place = {key: index for index, key in enumerate(sorted({_key(row) for row in pool}))}
    halves: tuple[Rows, Rows] = ([], [])
    for row in _prompts_first(pool):
        halves[place[_key(row)] % 2].append(row)
    return halves


def _prompts_first(rows: Rows) -> Rows:
    seen: Counter[str] = Counter()
    turns = []
    for row in rows:
        turns.append((seen[_key(row)], _key(row)))
        seen[_key(row)] += 1
    return [rows[index] for index in sorted(range(len(rows)), key=turns.__getitem__)]


def _weigh(rows: Rows, weight: float) -> Rows:
    """`rows` as often as `weight` says; of a fraction, the prompts that come first by hash."""
    prompts = sorted({_key(row) for row in rows}, reverse=True)
    part = set(prompts[: round((weight % 1) * len(prompts))])
    return rows * int(weight) + [row for row in rows if _key(row) in part]


# --- report ------------------------------------------------------------------------------------------------------


def _report(train: Rows, select: Rows, test: Rows, kind: Kind, faults: list[Fault]) -> dict[str, Any]:
    rows = [*train, *select, *test]
    report: dict[str, Any] = {
        "kind": kind,
        "rows": {"train": len(train), "select": len(select), "test": len(test), "dropped": len(faults)},
        "prompts": {
            n: len({_key(r) for r in part}) for n, part in (("train", train), ("select", select), ("test", test))
        },
        "dropped_by_reason": dict(Counter(fault.reason for fault in faults).most_common()),
        "cut_at_max_length": sum(row["tokens"]["cut"] for row in rows),
        "tokens": {name: _spread([row["tokens"][name] for row in rows]) for name in ("prompt", *ANSWERS[kind])},
    }
    if kind == "pairs":
        report["longer_is_chosen"] = statistics.fmean(_longer_wins(row["tokens"]) for row in rows)
    else:
        report["desirable"] = sum(row["label"] for row in train)
    return report


def _longer_wins(tokens: dict[str, int]) -> float:
    return 0.5 * ((tokens["chosen"] > tokens["rejected"]) + (tokens["chosen"] >= tokens["rejected"]))


def _spread(lengths: Iterable[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "max": ordered[-1]}
