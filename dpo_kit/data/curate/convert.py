"""From rows of any form to pairs or unary labels: from pairs, labels, ratings and rankings."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from dpo_kit.data.curate.options import Convert
from dpo_kit.data.forms import Form, Values, prefer
from dpo_kit.data.read import Fault, Row
from dpo_kit.data.rows import Kind, normalise
from dpo_kit.errors import ConfigError
from dpo_kit.run.files import digest

COLUMNS = {"pairs": ("chosen", "rejected"), "unary": ("completion", "label")}
GROUPED = ("unary", "rated")  # kinds of rows with one answer each: those to one prompt make a pair
Asked = tuple[list[str], Values, bool]  # places of the rows, what they say together, and whether it is one answer


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


def convert(sources: Iterable[tuple[Form, Sequence[Row]]], options: Convert, seed: int) -> Converted:
    """All rows of `sources`, read by their forms, as `options.to`. Raises ConfigError.

    Every row is in `used`, in `faults`, or in both (where only some of its answers could be used); what comes out is in
    the order of the rows.
    """
    result = Converted(options.to, [])
    asked = [([row.place], row.values, form.rows in GROUPED) for form, rows in sources for row in rows]
    made = (_pairs if options.to == "pairs" else _labels)(asked, options, seed, result)
    seen = set()
    for values in made:
        if (key := digest([values[name] for name in ("prompt", *COLUMNS[options.to])])) not in seen:
            seen.add(key)
            result.rows.append(values)
        else:
            result.repeated += 1
    return result


# --- to pairs ----------------------------------------------------------------------------------------------------


def _pairs(asked: Iterable[Asked], options: Convert, seed: int, result: Converted) -> Iterator[Values]:
    for places, values in _together(asked):
        made = [values] if "chosen" in values else [prefer(values, *two) for two in _chosen(values, options, seed)]
        kept = list(_well_formed(made, "pairs", places, result.faults))
        if not made:
            reason = "no two answers that differ in score" if len(values["answers"]) > 1 else "only one answer"
            remedy = "add another answer, or lower convert.min_gap"
            result.faults += [Fault(place, reason, f"scores {values['scores']}"[:60], remedy) for place in places]
        result.used.update(places if kept else ())
        yield from kept


def _together(asked: Iterable[Asked]) -> Iterator[tuple[list[str], Values]]:
    """Pairs and scored answers as they are; single answers to one prompt together, where the prompt is first met."""
    groups: dict[str, tuple[list[str], Values]] = {}
    for number, (places, values, is_single) in enumerate(asked):
        if "label" in values and is_single:
            values = values | {"answers": [values["completion"]], "scores": [float(values["label"])]}
            values = {name: value for name, value in values.items() if name not in ("completion", "label")}
        key = digest(values["prompt"]) if is_single else str(number)
        if key in groups:
            groups[key][0].extend(places)
            for name in ("answers", "scores"):
                groups[key][1][name].extend(values[name])
        else:
            groups[key] = places, values
    yield from groups.values()


def _chosen(values: Values, options: Convert, seed: int) -> list[tuple[int, int]]:
    """(better, worse) of the pairs to make: they differ in score, by `min_gap` or more."""
    scores = values["scores"]
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
    return [random.Random(f"{seed} {digest(values['prompt'])}").choice(of_best)]


# --- to unary rows -----------------------------------------------------------------------------------------------


def _labels(asked: Iterable[Asked], options: Convert, seed: int, result: Converted) -> Iterator[Values]:
    """One row for each answer; an answer to one prompt with both labels is left out."""
    kept = [
        (places[0], row)
        for places, values, _ in asked
        for row in _well_formed(_of_each_answer(values, options), "unary", places, result.faults)
    ]
    labels: dict[str, set[bool]] = {}
    for _, values in kept:
        labels.setdefault(digest([values["prompt"], values["completion"]]), set()).add(values["label"])
    for place, values in kept:
        if len(labels[digest([values["prompt"], values["completion"]])]) > 1:
            remedy = "decide which of the rows is right"
            result.faults.append(Fault(place, "an answer has both labels", str(values["completion"])[:40], remedy))
        else:
            result.used.add(place)
            yield values


def _of_each_answer(values: Values, options: Convert) -> Iterator[Values]:
    if "label" in values:
        yield values
        return
    if "chosen" in values:
        values = values | {"answers": [values["chosen"], values["rejected"]], "scores": [1.0, 0.0]}
        threshold: float | None = 0.5
    else:
        threshold = options.threshold
    if threshold is None:
        raise ConfigError("convert.threshold is missing: from which score on is an answer a thumbs up?")
    rest = {name: value for name, value in values.items() if name not in ("chosen", "rejected", "answers", "scores")}
    for answer, score in zip(values["answers"], values["scores"], strict=True):
        yield rest | {"completion": answer, "label": score >= threshold}


def _well_formed(made: Iterable[Values], kind: Kind, places: list[str], faults: list[Fault]) -> Iterator[Values]:
    """The rows as training takes them; the fault of another one is noted for each row that it was made of."""
    for values in made:
        found = normalise(Row(places[0], values), kind)
        if isinstance(found, Row):
            yield found.values
        else:
            faults += [Fault(place, found.reason, found.found, found.remedy) for place in places]
