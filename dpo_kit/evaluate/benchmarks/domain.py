"""A labelled file of one's own: exact match, accuracy, precision, recall and F1, BLEU, ROUGE, by both models.

sacrebleu and rouge-score compute BLEU and ROUGE; here they are paired by row and given intervals.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.config.limits import missing_package
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.benchmarks.dialogue import Speaker
from dpo_kit.evaluate.options import Domain
from dpo_kit.evaluate.rows import read_rows
from dpo_kit.model.chats import Prompt
from dpo_kit.run.files import write_jsonl

DRAWS = 2000
MOST_LABELS = 1000  # the table of what was said for what is as large as its square
NO_LABEL = "(none)"  # what stands for an answer in which no label was found


@dataclass(frozen=True)
class Labelled:
    """Prompts and what their answers should be: labels, one of which an answer names, or texts to compare it with."""

    kind: str  # labels | texts
    prompts: list[Prompt]
    targets: list[str]


def run_domain(policy: Speaker, reference: Speaker, options: Domain, folder: Path) -> dict[str, Any]:
    """{kind, n, figures: [as of `bootstrap_figures`], unrecognised: {model: answers without a label}}.

    The answers are written to `folder`/domain.jsonl. DataError names a row that is not {prompt, label | reference}.
    """
    speakers = (policy, reference)
    rows = read_labelled(options)
    answers = [speaker.answer(rows.prompts, options.temperature) for speaker in speakers]
    unrecognised = {}
    metrics: list[LabelMetrics | TextMetrics]
    if rows.kind == "labels":
        targets = [normalise(target) for target in rows.targets]
        labels = sorted(set(targets))
        read = [[find_label(answer, labels, options.pattern) for answer in side] for side in answers]
        unrecognised = {speaker.name: side.count(NO_LABEL) for speaker, side in zip(speakers, read, strict=True)}
        metrics = [LabelMetrics(side, targets, labels) for side in read]
    else:
        read = [[extract(answer, options.pattern) for answer in side] for side in answers]
        metrics = [TextMetrics(side, rows.targets) for side in read]
    columns = zip(rows.prompts, rows.targets, *answers, *read, strict=True)
    write_jsonl(
        folder / "domain.jsonl",
        (
            {
                "prompt": prompt,
                "target": target,
                policy.name: {"answer": ours, "read_as": our_reading},
                reference.name: {"answer": theirs, "read_as": their_reading},
            }
            for prompt, target, ours, theirs, our_reading, their_reading in columns
        ),
    )
    figures = bootstrap_figures(metrics[0], metrics[1], len(rows.prompts))
    return {"kind": rows.kind, "n": len(rows.prompts), "figures": figures, "unrecognised": unrecognised}


def read_labelled(options: Domain) -> Labelled:
    """Rows with `prompt` (text or messages), and all with `label` or all with `reference`. DataError names the line."""
    prompts, targets, columns = [], [], set()
    for row in read_rows("domain.file", options.file):
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
    return Labelled(kind, prompts[: options.limit], targets[: options.limit])


# --- reading answers ---------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """A text as it is compared: one case, one width, single spaces, no quotes or full stop around it."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(" .!\"'`*“”‘’。")


def find_label(answer: str, labels: Sequence[str], pattern: str | None = None) -> str:
    """The one normalised label that an answer names; `(none)` where it names none or several.

    Where `pattern` is given, only what it finds counts.
    """
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
        import numpy as np

        codes = {label: number for number, label in enumerate([*labels, NO_LABEL])}
        self.size = len(codes)
        pairs = zip(targets, read, strict=True)
        self.cells = np.array([codes[target] * self.size + codes[label] for target, label in pairs])

    def __call__(self, rows: Any) -> list[float]:
        """The averages are over labels that occur among targets or answers; 0 for a label whose denominator is 0, as
        scikit-learn has it.
        """
        import numpy as np

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
        import numpy as np

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
    import numpy as np

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
