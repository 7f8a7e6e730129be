"""From one schema to the rows that are trained on: pairs or unary labels, from pairs, labels, ratings and rankings."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from dpo_kit.data.options import Convert
from dpo_kit.data.read import Fault, Row
from dpo_kit.data.rows import Kind, digest, normalise
from dpo_kit.data.schemas import SCHEMAS, Judged, UnfitError
from dpo_kit.errors import ConfigError

GROUPED = ("unary", "rated")  # one answer a row: rows of one prompt make a pair


@dataclass
class Converted:
    """What came out: rows, the places of the rows that they were made of, what could not be made and why, and how many
    rows came out twice and are there once.
    """

    kind: Kind
    rows: list[dict[str, Any]]
    faults: list[Fault] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    repeated: int = 0


def convert(items: Iterable[Row | Fault], options: Convert, columns: dict[str, str], seed: int) -> Converted:
    """All rows of `items`, read by `options.schema`, as `options.to`. Raises ConfigError.

    Every row is in `used`, in `faults`, or in both (where only some of its answers could be used); what comes out is in
    the order of the rows.
    """
    result = Converted(options.to, [])
    asked = _judge(items, options, columns, result.faults)
    if options.to == "pairs":
        made = _pairs(_together(asked) if options.schema_ in GROUPED else asked, options, seed, result)
    else:
        made = _labels(asked, options, result)
    seen = set()
    for values in made:
        if (key := digest([values[name] for name in ("prompt", *_columns(options.to))])) not in seen:
            seen.add(key)
            result.rows.append(values)
        else:
            result.repeated += 1
    return result


def _columns(kind: Kind) -> tuple[str, ...]:
    return ("chosen", "rejected") if kind == "pairs" else ("completion", "label")


Asked = tuple[list[str], Judged]  # places of the rows, and what they say together


def _judge(
    items: Iterable[Row | Fault], options: Convert, columns: dict[str, str], faults: list[Fault]
) -> Iterator[Asked]:
    for item in items:
        if isinstance(item, Fault):
            faults.append(item)
            continue
        renamed = {ours: item.values[theirs] for ours, theirs in columns.items() if theirs in item.values}
        values = {key: value for key, value in item.values.items() if key not in columns.values()} | renamed
        try:
            yield [item.place], SCHEMAS[options.schema_](values)
        except UnfitError as unfit:
            faults.append(Fault(item.place, *unfit.args))


def _together(asked: Iterable[Asked]) -> Iterator[Asked]:
    """The answers of each prompt together, in the order in which prompts are first met."""
    groups: dict[str, Asked] = {}
    for places, judged in asked:
        key = digest(judged.prompt)
        if key in groups:
            groups[key][0].extend(places)
            groups[key][1].answers.extend(judged.answers)
            groups[key][1].scores.extend(judged.scores)
        else:
            groups[key] = places, judged
    yield from groups.values()


# --- to pairs ----------------------------------------------------------------------------------------------------


def _pairs(asked: Iterable[Asked], options: Convert, seed: int, result: Converted) -> Iterator[dict[str, Any]]:
    for places, judged in asked:
        made = list(_of_one_prompt(judged, options, seed))
        kept = [values for values in made if _well_formed(values, "pairs", places, result.faults)]
        if not made:
            reason = "no two answers that differ in score" if len(judged.answers) > 1 else "only one answer"
            remedy = "add another answer, or lower convert.min_gap"
            result.faults += [Fault(place, reason, f"scores {judged.scores}"[:60], remedy) for place in places]
        result.used.update(places if kept else ())
        yield from kept


def _of_one_prompt(judged: Judged, options: Convert, seed: int) -> Iterator[dict[str, Any]]:
    if judged.is_pair:
        yield {"prompt": judged.prompt, "chosen": judged.answers[0], "rejected": judged.answers[1]} | judged.rest
        return
    for best, other in _chosen_indices(judged, options, seed):
        yield judged.rest | {
            "prompt": judged.prompt,
            "chosen": judged.answers[best],
            "rejected": judged.answers[other],
            "score_chosen": judged.scores[best],
            "score_rejected": judged.scores[other],
        }


def _chosen_indices(judged: Judged, options: Convert, seed: int) -> list[tuple[int, int]]:
    """(better, worse) of the pairs to make: they differ in score, by `min_gap` or more."""
    scores = judged.scores
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    able = [
        (one, other)
        for one, other in combinations(order, 2)
        if scores[one] > scores[other] and scores[one] - scores[other] >= options.min_gap
    ]
    of_best = [pair for pair in able if pair[0] == order[0]]
    if options.pairing == "all" or not of_best:
        return able if options.pairing == "all" else []
    if options.pairing == "best_worst":
        return of_best[-1:]
    return [random.Random(f"{seed} {digest(judged.prompt)}").choice(of_best)]


# --- to unary rows -----------------------------------------------------------------------------------------------


def _labels(asked: Iterable[Asked], options: Convert, result: Converted) -> Iterator[dict[str, Any]]:
    """One row for each answer; an answer to one prompt with both labels is left out."""
    made = [(places[0], values) for places, judged in asked for values in _of_each_answer(judged, options)]
    labels: dict[str, set[bool]] = {}
    for _, values in made:
        labels.setdefault(digest([values["prompt"], values["completion"]]), set()).add(values["label"])
    for place, values in made:
        if len(labels[digest([values["prompt"], values["completion"]])]) > 1:
            remedy = "decide which of the rows is right"
            result.faults.append(Fault(place, "an answer has both labels", str(values["completion"])[:40], remedy))
        elif _well_formed(values, "unary", [place], result.faults):
            result.used.add(place)
            yield values


def _of_each_answer(judged: Judged, options: Convert) -> Iterator[dict[str, Any]]:
    threshold = 0.5 if judged.is_pair or options.schema_ == "unary" else options.threshold
    if threshold is None:
        raise ConfigError("convert.threshold is missing: from which score on is an answer a thumbs up?")
    for answer, score in zip(judged.answers, judged.scores, strict=True):
        yield {"prompt": judged.prompt, "completion": answer, "label": score >= threshold} | judged.rest


def _well_formed(values: dict[str, Any], kind: Kind, places: list[str], faults: list[Fault]) -> bool:
    """Whether training would take the row; else its fault is noted for each row that it was made of."""
    found = normalise(Row(places[0], values), kind, {})
    if isinstance(found, Fault):
        faults += [Fault(place, found.reason, found.found, found.remedy) for place in places]
    return isinstance(found, Row)
