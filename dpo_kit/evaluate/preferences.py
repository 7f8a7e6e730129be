"""What the implicit reward says of held-out pairs: how often it is right, how sure, and where it goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from dpo_kit.errors import ModelError
from dpo_kit.evaluate.job import Candidate, Job
from dpo_kit.evaluate.part import Found, Line, Note, Part, line
from dpo_kit.run.measures import HELD_OUT, MEASURES, as_measured
from dpo_kit.run.report.numbers import labelled_rows, number_text
from dpo_kit.run.rounding import in_rounding, rounding_text
from dpo_kit.run.statistics import mcnemar, means_by_name, paired_bootstrap

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_kit.callbacks.scores import Scores
    from dpo_kit.data.prepare import Rows

GROUPS = 4  # of pairs by score gap
BINS = 10  # of the reliability table, over confidences from ½ to 1
FITTED = "accuracy_length_corrected_logistic"
COLUMNS = {measure.key.removeprefix("probe/"): measure.column for measure in MEASURES}  # as result.json names them


class Preferences(Part):
    """The implicit reward on held-out rows, and with `against=` the paired difference from another."""

    def measure(self, job: Job) -> Found:
        kind, rows = job.held_out()
        if kind == "prompts":
            return {"status": "skipped", "reason": "the held-out rows are prompts without answers"}
        job.folder.mkdir(parents=True, exist_ok=True)
        scores, used = _score(job, job.policy, job.reference, rows, job.beta, job.folder / "preferences.jsonl")
        found = {
            "status": "done", "policy": job.policy.name, "reference": job.reference.name, "split": job.split,
            "beta": job.beta, **describe_preferences(scores, used, job.beta, job.method.saturation),
        }  # fmt: skip
        other = job.opponent
        if kind == "pairs" and isinstance(other, Candidate) and other != job.reference:
            reference = job.reference if other.tuned is None else other.start
            theirs = margins_by_pair(*_score(job, other, reference, rows, None))
            found["against"] = {"name": other.name, **compare_preferences(margins_by_pair(scores, used), theirs)}
        return found

    def headline(self, found: Found) -> Found:
        rows = found.get("pairs", found.get("rows"))
        return {"held_out_rows": rows} | {key: found[key] for key in (*HELD_OUT, FITTED) if key in found}

    def tell(self, found: Found) -> Iterator[Line | Note]:
        count = f"{found['pairs']:,} pairs" if found["kind"] == "pairs" else f"{found['rows']:,} answers"
        yield f"held-out rows ({found['split']})", count, ""
        yield from labelled_rows(found, {key: COLUMNS[key] for key in ("accuracy", "auc")})
        yield from labelled_rows(found, {"margin_nats": COLUMNS["margin_nats"]}, ".2f")
        yield from labelled_rows(found, {FITTED: "accuracy at equal length (logistic fit)"})
        if calibration := found.get("calibration"):
            yield "calibration error (ECE)", f"{calibration['ece']:.3f}", ""
        yield "chosen less likely than before", f"{found['displacement']:.0%}", ""
        if floor := found.get("floor_nats"):
            yield COLUMNS["floor_nats"], number_text(floor, ".3f"), ""
        for key, test in found.get("against", {}).items():
            if key != "name":
                label = f"{key.replace('_nats', ', nats')}, less that of {found['against']['name']}"
                yield line(label, test, "difference", "+.3f")
        measured = as_measured(found)
        if in_rounding("probe/accuracy", measured):
            yield Note(f"{rounding_text(measured).capitalize()}: what they say of preferences is rounding.")


def _score(
    job: Job, policy: Candidate, reference: Candidate, rows: Rows, beta: float | None, path: Path | None = None
) -> tuple[Scores, Rows]:
    """Scores of `policy` against `reference`, row by row also in the file `path`, and the rows that were scored."""
    from dpo_kit.model.other_reference import token_differences
    from dpo_kit.run.quiet import quiet_libraries
    from dpo_kit.trainer.held_out import Tuned, place, score_rows

    quiet_libraries()
    tuned_from_it = policy.tuned is not None and policy.model.path == reference.model.path
    if not tuned_from_it and (differing := token_differences(policy.tokenizer(), reference.tokenizer())):
        raise ModelError(
            f"{policy.name} and {reference.name} have other vocabularies ({'; '.join(differing)}), so that their "
            "log-probabilities would be those of other texts: compare answers instead, parts=[win_rate]"
        )
    tuned = Tuned(place(policy.load()), policy.tokenizer(), SimpleNamespace(**job.config["trl"]))
    return score_rows(tuned, rows, reference.load(), beta, path)


def describe_preferences(scores: Scores, rows: Rows, beta: float | None, saturation: str | None) -> Found:
    """All that `scores` say of `rows` (those scored, in their order): nats, shares, 95 % intervals.

    Pairs: accuracy (Wilson on as many pairs as are effectively independent, prompts as clusters), margin (bootstrap by
    prompt), displacement, and accuracy in groups; calibration where `beta` makes a reward of the margin. Unary rows:
    AUC and class gap.
    """
    import torch

    from dpo_kit.callbacks.scores import preference_metrics, reward_metrics
    from dpo_kit.data.report.figures import scores_of

    plain = preference_metrics(scores, beta, saturation) | reward_metrics(scores, beta)
    found: Found = {name.removeprefix("probe/"): value for name, value in plain.items()}
    found["prompts"] = len({*scores.prompts_chosen, *scores.prompts_rejected})
    if not scores.paired:
        return {"kind": "unary", "rows": len(rows), **found}
    margins, prompts = scores.logratio_chosen - scores.logratio_rejected, scores.prompts_chosen
    tokens = scores.tokens_chosen - scores.tokens_rejected
    ratings = [scores_of(row) for row in rows]
    gaps = [math.nan if rating is None else abs(rating[0] - rating[1]) for rating in ratings]
    values = torch.tensor(gaps, dtype=torch.float64)
    known = values[~values.isnan()]
    by_gap = []  # accuracy in groups of about as many pairs, from the closest calls to the clearest
    if len(known):
        edges = torch.quantile(known, torch.linspace(0, 1, GROUPS + 1, dtype=torch.float64)).unique().tolist()
        for low, high in pairwise(edges if len(edges) > 1 else edges * 2):
            inside = (values >= low) & ((values <= high) if high == edges[-1] else (values < high))  # never for nan
            if inside.any():
                by_gap.append({"from": low, "to": high, **_group(margins, inside, prompts)})
    lengths = {"chosen longer": tokens > 0, "chosen shorter": tokens < 0, "equally long": tokens == 0}
    found[FITTED] = found.pop("accuracy_length_corrected", None)
    return {
        "kind": "pairs", "pairs": len(rows), **found,
        "calibration": None if beta is None else describe_calibration(beta * margins, prompts),
        "by_score_gap": by_gap,
        "by_length": {name: _group(margins, inside, prompts) for name, inside in lengths.items()},
    }  # fmt: skip


def describe_calibration(rewards: Tensor, prompts: Sequence[str]) -> Found:
    """How far σ(reward margin), the confidence in the answer that it prefers, agrees with how often that is right.
    `reliability`: a row for each tenth of the confidences from ½ to 1 that occurs; `ece`: the mean gap between
    confidence and accuracy, rows weighed by their pairs (expected calibration error, arXiv:1706.04599).
    """
    from dpo_kit.callbacks.metrics import accuracy

    confidence = rewards.double().abs().sigmoid()
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    rows = []
    for number in place.unique().tolist():
        inside = place == number
        ends = {"from": 0.5 + number / (2 * BINS), "to": 0.5 + (number + 1) / (2 * BINS)}
        rows.append(ends | {"confidence": float(confidence[inside].mean()), **_group(rewards, inside, prompts)})
    gaps = [row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in rows]
    mean, ece = float(confidence.mean()), sum(gaps) / len(rewards)
    return {"ece": ece, "mean_confidence": mean, "accuracy": accuracy(rewards), "reliability": rows}


def _group(margins: Tensor, inside: Tensor, prompts: Sequence[str]) -> Found:
    """Pairs and accuracy with its interval of those that are `inside`; None where there is none."""
    from dpo_kit.callbacks.metrics import accuracy, accuracy_interval

    members = [prompt for prompt, is_inside in zip(prompts, inside.tolist(), strict=True) if is_inside]
    if not members:
        return {"pairs": 0, "accuracy": None, "low": None, "high": None}
    low, high = accuracy_interval(margins[inside], members)
    return {"pairs": len(members), "accuracy": accuracy(margins[inside]), "low": low, "high": high}


Margins = dict[str, tuple[str, float]]  # {pair_id: (prompt_id, margin in nats)}


def margins_by_pair(scores: Scores, rows: Rows) -> Margins:
    """{} for unary rows."""
    if not scores.paired:
        return {}
    margins = (scores.logratio_chosen - scores.logratio_rejected).tolist()
    return {row["pair_id"]: (row["prompt_id"], value) for row, value in zip(rows, margins, strict=True)}


def compare_preferences(ours: Margins, theirs: Margins) -> Found:
    """Two policies on the same pairs, ours less theirs. Accuracy by McNemar's exact test, margin by paired bootstrap,
    both by prompt; empty below two common pairs.
    """
    common = ours.keys() & theirs.keys()
    means = [means_by_name(side[pair] for pair in common) for side in (ours, theirs)]
    tests = {"accuracy": mcnemar(ours, theirs), "margin_nats": paired_bootstrap(means[0], means[1])}
    return {
        name: {"difference": test.value, "low": test.low, "high": test.high, "p": test.p, "count": test.count,
               "test": test.basis, "needed": test.needed}
        for name, test in tests.items() if test is not None
    }  # fmt: skip
