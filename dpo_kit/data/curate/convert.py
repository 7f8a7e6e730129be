"""From rows of any form to pairs or unary labels: from pairs, labels, ratings and rankings."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from dpo_kit.data.forms import Form, Values
from dpo_kit.data.options import Convert
from dpo_kit.data.published import prefer
from dpo_kit.data.read import Fault, Row
from dpo_kit.data.rows import ANSWERS, Kind, Rows, normalise
from dpo_kit.errors import ConfigError
from dpo_kit.run.files import digest

Sources = Iterable[tuple[Form, Sequence[Row]]]


@dataclass
class Converted:
    """The rows made, the places of those that they were made of, what could not be made, how many came out twice."""

    rows: Rows = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    repeated: int = 0

    def well_formed(self, made: Iterable[Values], kind: Kind, places: list[str]) -> Iterator[Values]:
        """The rows as training takes them; the fault of another one is noted for each row that it was made of."""
        for values in made:
            row = normalise(Row(places[0], values), kind)
            if isinstance(row, Row):
                yield row.values
            else:
                self.faults += [replace(row, place=place) for place in places]


def convert(sources: Sources, options: Convert, seed: int) -> Converted:
    """All rows of `sources`, read by their forms, as `options.to`, in their order. Raises ConfigError.

    Every row is in `used`, in `faults`, or in both (where only some of its answers could be used).
    """
    result, seen = Converted(), set()
    columns = ("prompt", *ANSWERS[options.to], *(("label",) if options.to == "unary" else ()))
    is_pairs = options.to == "pairs"
    for values in _pairs(sources, options, seed, result) if is_pairs else _thumbs(sources, options, result):
        if (key := digest([values[name] for name in columns])) not in seen:
            seen.add(key)
            result.rows.append(values)
        else:
            result.repeated += 1
    return result


def _pairs(sources: Sources, options: Convert, seed: int, result: Converted) -> Iterator[Values]:
    """Pairs as they are, and those that scored answers make: of a row, or where a row has one answer (a thumb is a
    score as well) of all rows with one prompt, in the place where it is first met.
    """
    groups: dict[str, tuple[list[str], Values]] = {}
    for form, rows in sources:
        for row in rows:
            values, is_single = row.values, form.rows in ("unary", "rated")
            if "label" in values and is_single:
                values = values | {"answers": [values["completion"]], "scores": [float(values["label"])]}
                values = {name: value for name, value in values.items() if name not in ("completion", "label")}
            key = digest(values["prompt"]) if is_single else str(len(groups))
            places, together = groups.setdefault(key, ([], values))
            places.append(row.place)
            for name in ("answers", "scores") if together is not values else ():
                together[name].extend(values[name])
    for places, values in groups.values():
        made = [values] if "chosen" in values else [prefer(values, *two) for two in _chosen(values, options, seed)]
        kept = list(result.well_formed(made, "pairs", places))
        if not made:
            reason = "no two answers that differ in score" if len(values["answers"]) > 1 else "only one answer"
            remedy = "add another answer, or lower convert.min_gap"
            result.faults += [Fault(place, reason, f"scores {values['scores']}"[:60], remedy) for place in places]
        result.used.update(places if kept else ())
        yield from kept


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


def _thumbs(sources: Sources, options: Convert, result: Converted) -> Iterator[Values]:
    """One row for each answer; an answer to one prompt with both labels is left out."""
    kept = []
    labels: dict[str, set[bool]] = defaultdict(set)
    for row in (row for _, rows in sources for row in rows):
        for made in result.well_formed(_of_each_answer(row.values, options), "unary", [row.place]):
            key = digest([made["prompt"], made["completion"]])
            labels[key].add(made["label"])
            kept.append((row.place, key, made))
    for place, key, made in kept:
        if len(labels[key]) > 1:
            remedy = "decide which of the rows is right"
            result.faults.append(Fault(place, "an answer has both labels", str(made["completion"])[:40], remedy))
        else:
            result.used.add(place)
            yield made


def _of_each_answer(values: Values, options: Convert) -> Iterator[Values]:
    if "label" in values:
        yield values
        return
    threshold = options.threshold
    if "chosen" in values:
        values, threshold = values | {"answers": [values["chosen"], values["rejected"]], "scores": [1.0, 0.0]}, 0.5
    if threshold is None:
        raise ConfigError("convert.threshold is missing: from which score on is an answer a thumbs up?")
    rest = {name: value for name, value in values.items() if name not in ("chosen", "rejected", "answers", "scores")}
    for answer, score in zip(values["answers"], values["scores"], strict=True):
        yield rest | {"completion": answer, "label": score >= threshold}
