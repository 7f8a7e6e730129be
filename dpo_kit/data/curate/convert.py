"""From rows of any form to pairs or unary labels: from pairs, labels, ratings and rankings."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from dpo_kit.data.curate.options import Convert
from dpo_kit.data.forms import Form, Values
from dpo_kit.data.other_forms import prefer
from dpo_kit.data.read import Fault, Row
from dpo_kit.data.rows import Kind, normalise
from dpo_kit.errors import ConfigError
from dpo_kit.run.files import digest

GROUPED = ("unary", "rated")  # kinds of rows with one answer each: those to one prompt make a pair
Asked = tuple[list[str], Values, bool]  # places of the rows, what they say together, and whether it is one answer


@dataclass
class Converted:
    """The rows made, the places of those that they were made of, what could not be made, how many came out twice."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    repeated: int = 0


def convert(sources: Iterable[tuple[Form, Sequence[Row]]], options: Convert, seed: int) -> Converted:
    """All rows of `sources`, read by their forms, as `options.to`. Raises ConfigError.

    Every row is in `used`, in `faults`, or in both (where only some of its answers could be used); what comes out is in
    the order of the rows.
    """
    result = Converted()
    asked = [([row.place], row.values, form.rows in GROUPED) for form, rows in sources for row in rows]
    is_pairs = options.to == "pairs"
    columns = ("prompt", "chosen", "rejected") if is_pairs else ("prompt", "completion", "label")
    seen = set()
    for values in _pairs(asked, options, seed, result) if is_pairs else _thumbs(asked, options, result):
        if (key := digest([values[name] for name in columns])) not in seen:
            seen.add(key)
            result.rows.append(values)
        else:
            result.repeated += 1
    return result


def _well_formed(made: Iterable[Values], kind: Kind, places: list[str], faults: list[Fault]) -> Iterator[Values]:
    """The rows as training takes them; the fault of another one is noted for each row that it was made of."""
    for values in made:
        row = normalise(Row(places[0], values), kind)
        if isinstance(row, Row):
            yield row.values
        else:
            faults += [replace(row, place=place) for place in places]


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
    gaps = {(one, other): scores[one] - scores[other] for one, other in combinations(order, 2)}
    able = [pair for pair, gap in gaps.items() if gap > 0 and gap >= options.min_gap]
    if options.pairing == "all":
        return able
    of_best = [pair for pair in able if pair[0] == order[0]]
    if options.pairing == "best_worst" or not of_best:
        return of_best[-1:]
    return [random.Random(f"{seed} {digest(values['prompt'])}").choice(of_best)]


# --- to unary rows -----------------------------------------------------------------------------------------------


def _thumbs(asked: Iterable[Asked], options: Convert, result: Converted) -> Iterator[Values]:
    """One row for each answer; an answer to one prompt with both labels is left out."""
    kept = []
    labels: dict[str, set[bool]] = defaultdict(set)
    for places, values, _ in asked:
        for row in _well_formed(_of_each_answer(values, options), "unary", places, result.faults):
            key = digest([row["prompt"], row["completion"]])
            labels[key].add(row["label"])
            kept.append((places[0], key, row))
    for place, key, row in kept:
        if len(labels[key]) > 1:
            remedy = "decide which of the rows is right"
            result.faults.append(Fault(place, "an answer has both labels", str(row["completion"])[:40], remedy))
        else:
            result.used.add(place)
            yield row


def _of_each_answer(values: Values, options: Convert) -> Iterator[Values]:
    if "label" in values:
        yield values
        return
    threshold = options.threshold
    if "chosen" in values:
        values = values | {"answers": [values["chosen"], values["rejected"]], "scores": [1.0, 0.0]}
        threshold = 0.5
    if threshold is None:
        raise ConfigError("convert.threshold is missing: from which score on is an answer a thumbs up?")
    rest = {name: value for name, value in values.items() if name not in ("chosen", "rejected", "answers", "scores")}
    for answer, score in zip(values["answers"], values["scores"], strict=True):
        yield rest | {"completion": answer, "label": score >= threshold}
