"""A labelled file of one's own: exact match, accuracy, precision, recall and F1, BLEU, ROUGE, by both models.

sacrebleu and rouge-score compute BLEU and ROUGE; here they are paired by row and given intervals.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dpo_kit.config.limits import missing_package
from dpo_kit.data.read import read_whole
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.options import Domain
from dpo_kit.evaluate.part import Found, Line, Note, Part, Speaker, asked, line, speakers_of
from dpo_kit.model.chats import Prompt
from dpo_kit.run.files import write_jsonl

DRAWS = 2000
MOST_LABELS = 1000  # the table of what was said for what is as large as its square
NO_LABEL = "(none)"  # what stands for an answer in which no label was found
Metrics = Callable[[Any], dict[str, float]]  # of the rows with the given numbers, of which several may be the same


class DomainPart(Part):
    """A labelled file of one's own."""

    def check(self, job: Job) -> None:
        read_labelled(asked(job.options.domain))

    def measure(self, job: Job) -> Found:
        options = asked(job.options.domain)
        with speakers_of(job, options.max_new_tokens) as speakers:
            return run_domain(*speakers, options, job.folder)

    def headline(self, found: Found) -> Found:
        """domain_accuracy, _low, _high (of the policy), _difference, _difference_low, _difference_high; so for each."""
        keys = {"": "policy", "_low": "policy_low", "_high": "policy_high", "_difference": "difference",
                "_difference_low": "low", "_difference_high": "high"}  # fmt: skip
        return {
            f"domain_{re.sub('[^a-z0-9]+', '_', figure['metric'].lower()).strip('_')}{end}": figure[key]
            for figure in found["figures"]
            for end, key in keys.items()
        }

    def tell(self, found: Found) -> Iterator[Line | Note]:
        for figure in found["figures"]:
            form = ".1f" if figure["metric"] == "BLEU" else ".3f"
            of_policy = figure | {"low": figure["policy_low"], "high": figure["policy_high"]}
            yield line(f"{figure['metric']}, {figure['n']:,} rows of one's own", of_policy, "policy", form)
            yield line("… less the reference's", figure, "difference", f"+{form}")
        if count := found["unrecognised_of_policy"]:
            yield Note(
                f"{count} of {found['n']} answers name no label, or several, and count as wrong: read domain.jsonl, or "
                "set domain.pattern."
            )


def run_domain(policy: Speaker, reference: Speaker, options: Domain, folder: Path) -> Found:
    """{status, unrecognised_of_policy, kind, n, figures, unrecognised: {model: n}}. `figures`: every metric of both
    models; `difference` is policy − reference, `low` to `high` its interval. 95 % intervals are bootstraps over rows
    (2,000 percentile draws), in which the metric is computed anew each time. The answers are written to
    `folder`/domain.jsonl. DataError names a row that is not {prompt, label | reference}.
    """
    speakers = (policy, reference)
    kind, prompts, expected = read_labelled(options)
    answers = [speaker.answer(prompts, options.temperature) for speaker in speakers]
    unrecognised = {}
    if kind == "labels":
        targets = [normalise(target) for target in expected]
        labels = sorted(set(targets))
        read = [[find_label(answer, labels, options.pattern) for answer in side] for side in answers]
        unrecognised = {speaker.name: side.count(NO_LABEL) for speaker, side in zip(speakers, read, strict=True)}
        metrics = [label_metrics(side, targets, labels) for side in read]
    else:
        read = [[extract(answer, options.pattern) for answer in side] for side in answers]
        metrics = [text_metrics(side, expected) for side in read]
    rows = [
        {"prompt": prompt, "target": target, policy.name: {"answer": ours, "read_as": our_reading},
         reference.name: {"answer": theirs, "read_as": their_reading}}
        for prompt, target, ours, theirs, our_reading, their_reading
        in zip(prompts, expected, *answers, *read, strict=True)
    ]  # fmt: skip
    write_jsonl(folder / "domain.jsonl", rows)
    count = len(prompts)
    generator, everything = np.random.default_rng(0), np.arange(count)
    drawn = (generator.integers(count, size=count) for _ in range(DRAWS))
    draws = np.array([[list(measure(chosen).values()) for measure in metrics] for chosen in drawn])  # the same: paired
    columns = [list(measure(everything).values()) for measure in metrics]
    for values in (draws[:, 0], draws[:, 0] - draws[:, 1]):
        columns += np.quantile(values, [0.025, 0.975], axis=0).tolist()
    figures = [
        {"metric": name, "policy": ours, "policy_low": ours_low, "policy_high": ours_high, "reference": theirs,
         "difference": ours - theirs, "low": low, "high": high, "n": count}
        for name, ours, theirs, ours_low, ours_high, low, high
        in zip(metrics[0](everything), *columns, strict=True)
    ]  # fmt: skip
    return {"status": "done", "unrecognised_of_policy": unrecognised.get(policy.name, 0), "kind": kind,
            "n": count, "figures": figures, "unrecognised": unrecognised}  # fmt: skip


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


def label_metrics(read: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> Metrics:
    """Accuracy, and precision, recall and F1 averaged over the labels that occur (0 for one whose denominator is 0, as
    scikit-learn has it); an answer without a label counts as wrong.
    """
    codes = {label: number for number, label in enumerate([*labels, NO_LABEL])}
    size = len(codes)
    cells = np.array([codes[target] * size + codes[label] for target, label in zip(targets, read, strict=True)])

    def measure(rows: Any) -> dict[str, float]:
        table = np.bincount(cells[rows], minlength=size**2).reshape(size, size)  # target, answer
        right = np.diag(table)[:-1]
        answered, expected = table.sum(0)[:-1], table.sum(1)[:-1]
        met = answered + expected > 0
        below = {"precision (macro)": answered, "recall (macro)": expected, "F1 (macro)": (answered + expected) / 2}
        macro = {name: float(np.mean(right[met] / np.maximum(count[met], 0.5))) for name, count in below.items()}
        return {"accuracy": float(right.sum() / len(rows)), **macro}

    return measure


def text_metrics(read: Sequence[str], targets: Sequence[str]) -> Metrics:
    """Exact match, BLEU (0 to 100, sacrebleu's defaults) and ROUGE-1, -2, -L (F-measure)."""
    for package in ("sacrebleu", "rouge_score"):
        if fault := missing_package("the domain metric", package):
            raise ConfigError(fault)
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    pairs = list(zip(read, targets, strict=True))
    exact = np.array([float(normalise(text) == normalise(target)) for text, target in pairs])
    bleu = BLEU(effective_order=True)  # of single rows; the counts are the same
    scores = [bleu.sentence_score(text, [target]) for text, target in pairs]
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])
    kinds = ("rouge1", "rouge2", "rougeL")
    # words of any script, lower case: rouge-score's own tokenizer knows a to z and 0 to 9 only
    words = SimpleNamespace(tokenize=lambda text: re.findall(r"[^\W_]+", text.lower()))
    scorer = RougeScorer(kinds, tokenizer=words)
    of_rows = [scorer.score(target, text) for text, target in pairs]
    rouge = {f"ROUGE-{kind[5:]}": np.array([row[kind].fmeasure for row in of_rows]) for kind in kinds}

    def measure(rows: Any) -> dict[str, float]:
        total = counts[rows].sum(0).tolist()
        score = BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score
        means = {name: float(values[rows].mean()) for name, values in rouge.items()}
        return {"exact match": float(exact[rows].mean()), "BLEU": float(score), **means}

    return measure
