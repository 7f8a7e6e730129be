"""A labelled file of one's own: exact match, accuracy, precision, recall and F1, BLEU, ROUGE, by both models.

sacrebleu and rouge-score compute BLEU and ROUGE; here they are paired by row and given intervals.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit.config.limits import missing_package
from dpo_kit.data.read import read_whole
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.benchmarks.dialogue import Speaker, asked, speakers_of
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.options import Domain
from dpo_kit.evaluate.part import Found, Line, Part, line
from dpo_kit.model.chats import Prompt
from dpo_kit.run.files import write_jsonl

DRAWS = 2000
MOST_LABELS = 1000  # the table of what was said for what is as large as its square
NO_LABEL = "(none)"  # what stands for an answer in which no label was found


def run_domain(policy: Speaker, reference: Speaker, options: Domain, folder: Path) -> dict[str, Any]:
    """{kind, n, figures: [as of `bootstrap_figures`], unrecognised: {model: answers without a label}}.

    The answers are written to `folder`/domain.jsonl. DataError names a row that is not {prompt, label | reference}.
    """
    speakers = (policy, reference)
    kind, prompts, expected = read_labelled(options)
    answers = [speaker.answer(prompts, options.temperature) for speaker in speakers]
    unrecognised = {}
    metrics: list[LabelMetrics | TextMetrics]
    if kind == "labels":
        targets = [normalise(target) for target in expected]
        labels = sorted(set(targets))
        read = [[find_label(answer, labels, options.pattern) for answer in side] for side in answers]
        unrecognised = {speaker.name: side.count(NO_LABEL) for speaker, side in zip(speakers, read, strict=True)}
        metrics = [LabelMetrics(side, targets, labels) for side in read]
    else:
        read = [[extract(answer, options.pattern) for answer in side] for side in answers]
        metrics = [TextMetrics(side, expected) for side in read]
    rows = []
    for prompt, target, *both in zip(prompts, expected, *answers, *read, strict=True):
        sides = zip(speakers, both[:2], both[2:], strict=True)
        said = {speaker.name: {"answer": answer, "read_as": reading} for speaker, answer, reading in sides}
        rows.append({"prompt": prompt, "target": target, **said})
    write_jsonl(folder / "domain.jsonl", rows)
    figures = bootstrap_figures(metrics[0], metrics[1], len(prompts))
    return {"kind": kind, "n": len(prompts), "figures": figures, "unrecognised": unrecognised}


def read_labelled(options: Domain) -> tuple[str, list[Prompt], list[str]]:
    """Prompts (text or messages) and what their answers should be: `labels`, one of which an answer names, or `texts`
    to compare it with (the column `reference`). DataError names the line.
    """
    prompts, targets, columns = [], [], set()
    for row in read_whole("domain.file", options.file):
        column = "label" if "label" in row.values else "reference"
        prompt, target = row.values.get("prompt"), row.values.get(column)
        if not isinstance(target, str | int | bool) or not isinstance(prompt, str | list) or not prompt:
            raise DataError(f"{row.place} must have prompt (text or messages) and label or reference (one text)")
        prompts.append(prompt)
        targets.append(str(target))
        columns.add(column)
    if len(prompts) < 2:
        raise DataError(f"domain.file={options.file} has {len(prompts)} rows: an interval needs two at least")
    if len(columns) > 1:
        raise DataError(f"domain.file={options.file} has rows with label and rows with reference: take one of them")
    kind = "labels" if columns == {"label"} else "texts"
    if kind == "labels" and (different := len(set(map(normalise, targets)))) > MOST_LABELS:
        raise DataError(
            f"domain.file={options.file} has {different:,} different labels, which is more than "
            f"{MOST_LABELS:,}: call the column reference, and answers are compared with it as texts"
        )
    return kind, prompts[: options.limit], targets[: options.limit]


# --- reading answers ---------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """A text as it is compared: one case, one width, single spaces, no quotes or full stop around it."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(" .!\"'`*“”‘’。")


def find_label(answer: str, labels: Sequence[str], pattern: str | None = None) -> str:
    """The one normalised label that an answer, or what `pattern` finds in it, names; `(none)` for none or several."""
    text = normalise(extract(answer, pattern))
    if text in labels or pattern:
        return text if text in labels else NO_LABEL
    # the longest first, and each place once: "not spam" does not name "spam"
    alternatives = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True) if label)
    named = set(re.findall(rf"(?<!\w)(?:{alternatives})(?!\w)", text)) if alternatives else set()
    return named.pop() if len(named) == 1 else NO_LABEL


def extract(answer: str, pattern: str | None) -> str:
    """What `pattern` finds last in an answer (its group where it has one), "" where nothing; without one, all of it."""
    if not pattern:
        return answer.strip()
    matches = list(re.finditer(pattern, answer))
    return (matches[-1].group(matches[-1].re.groups) or "") if matches else ""


# --- metrics: made of all answers, called with the numbers of some rows, of which several may be the same ----------


class LabelMetrics:
    """Accuracy, and precision, recall and F1 averaged over the labels; an answer without a label counts as wrong."""

    names = ("accuracy", "precision (macro)", "recall (macro)", "F1 (macro)")

    def __init__(self, read: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> None:
        codes = {label: number for number, label in enumerate([*labels, NO_LABEL])}
        self.size = len(codes)
        pairs = zip(targets, read, strict=True)
        self.cells = np.array([codes[target] * self.size + codes[label] for target, label in pairs])

    def __call__(self, rows: Any) -> list[float]:
        """Averages are over labels that occur; 0 for one whose denominator is 0, as scikit-learn has it."""
        table = np.bincount(self.cells[rows], minlength=self.size**2).reshape(self.size, self.size)  # target, answer
        right = np.diag(table)[:-1]
        answered, expected = table.sum(0)[:-1], table.sum(1)[:-1]
        met = answered + expected > 0
        denominators = (answered, expected, (answered + expected) / 2)
        averages = [float(np.mean(right[met] / np.maximum(below[met], 0.5))) for below in denominators]
        return [float(right.sum() / len(rows)), *averages]


class TextMetrics:
    """Exact match, BLEU (0 to 100, sacrebleu's defaults) and ROUGE-1, -2, -L (F-measure)."""

    names = ("exact match", "BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L")

    def __init__(self, read: Sequence[str], targets: Sequence[str]) -> None:
        for package in ("sacrebleu", "rouge_score"):
            if fault := missing_package("the domain metric", package):
                raise ConfigError(fault)
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU

        pairs = list(zip(read, targets, strict=True))
        self.exact = np.array([float(normalise(text) == normalise(target)) for text, target in pairs])
        bleu = BLEU(effective_order=True)  # of single rows; the counts are the same
        scores = [bleu.sentence_score(text, [target]) for text, target in pairs]
        self.counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])
        kinds = ("rouge1", "rouge2", "rougeL")
        scorer = RougeScorer(kinds, tokenizer=_Words())
        rouge = [scorer.score(target, text) for text, target in pairs]
        self.rouge = [np.array([score[kind].fmeasure for score in rouge]) for kind in kinds]

    def __call__(self, rows: Any) -> list[float]:
        from sacrebleu.metrics.bleu import BLEU

        total = self.counts[rows].sum(0).tolist()
        bleu = BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score
        return [float(self.exact[rows].mean()), float(bleu), *(float(values[rows].mean()) for values in self.rouge)]


class _Words:
    """Words of any script, lower case (rouge-score's own tokenizer knows a to z and 0 to 9 only)."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def bootstrap_figures(
    policy: LabelMetrics | TextMetrics, reference: LabelMetrics | TextMetrics, count: int
) -> list[dict[str, Any]]:
    """Every metric of both models over `count` rows; `difference` is policy − reference, `low` to `high` its interval.

    95 % intervals are bootstraps over rows (2,000 percentile draws), in which the metric is computed anew each time.
    """
    generator, everything = np.random.default_rng(0), np.arange(count)
    drawn = (generator.integers(count, size=count) for _ in range(DRAWS))
    draws = np.array([[policy(rows), reference(rows)] for rows in drawn])  # the same rows for both: paired
    columns = [policy(everything), reference(everything)]
    for values in (draws[:, 0], draws[:, 0] - draws[:, 1]):
        columns += np.quantile(values, [0.025, 0.975], axis=0).tolist()
    return [
        {"metric": name, "policy": ours, "policy_low": ours_low, "policy_high": ours_high, "reference": theirs,
         "difference": ours - theirs, "low": low, "high": high, "n": count}
        for name, ours, theirs, ours_low, ours_high, low, high in zip(policy.names, *columns, strict=True)
    ]  # fmt: skip


class DomainPart(Part):
    """A labelled file of one's own."""

    def check(self, job: Job) -> None:
        read_labelled(asked(job.options.domain))

    def measure(self, job: Job) -> Found:
        options = asked(job.options.domain)
        with speakers_of(job, options.max_new_tokens) as speakers:
            found = run_domain(*speakers, options, job.folder)
            return {"status": "done", "unrecognised_of_policy": found["unrecognised"].get(speakers[0].name, 0), **found}

    def headline(self, found: Found) -> Found:
        """domain_accuracy, _low, _high (of the policy), _difference, _difference_low, _difference_high; so for each."""
        keys = {"": "policy", "_low": "policy_low", "_high": "policy_high", "_difference": "difference",
                "_difference_low": "low", "_difference_high": "high"}  # fmt: skip
        return {
            f"domain_{re.sub('[^a-z0-9]+', '_', figure['metric'].lower()).strip('_')}{end}": figure[key]
            for figure in found["figures"]
            for end, key in keys.items()
        }

    def lines(self, found: Found) -> Iterator[Line]:
        for figure in found["figures"]:
            form = ".1f" if figure["metric"] == "BLEU" else ".3f"
            label = f"{figure['metric']}, {figure['n']:,} rows of one's own"
            yield line(label, figure["policy"], figure["policy_low"], figure["policy_high"], form)
            yield line("… less the reference's", figure["difference"], figure["low"], figure["high"], f"+{form}")

    def notes(self, found: Found) -> Iterator[str]:
        if count := found["unrecognised_of_policy"]:
            yield (
                f"{count} of {found['n']} answers name no label, or several, and count as wrong: read domain.jsonl, or "
                "set domain.pattern."
            )
