"""A labelled file of one's own: exact match, accuracy, precision, recall and F1, BLEU, ROUGE, by both models.

sacrebleu and rouge-score compute BLEU and ROUGE; here they are paired by row and given intervals.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_kit.config.limits import missing_package
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.benchmark_options import Domain
from dpo_kit.evaluate.benchmarks.dialogue import Speaker, check_names
from dpo_kit.model.chats import Prompt
from dpo_kit.run.files import write_jsonl

DRAWS = 2000
MOST_LABELS = 50  # more different values than that are texts
NO_LABEL = "(none)"  # what stands for an answer in which no label was found


@dataclass(frozen=True)
class Row:
    """One prompt and what its answer should be."""

    prompt: Prompt
    target: str


@dataclass(frozen=True)
class Figure:
    """One metric of both models on the same rows; `difference` is policy − reference with its 95 % interval.

    Intervals are bootstraps over rows (2,000 percentile draws), in which the metric is computed anew each time. Without
    a reference its three values are None.
    """

    metric: str
    policy: float
    policy_low: float
    policy_high: float
    reference: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int


def run_domain(policy: Speaker, reference: Speaker | None, options: Domain, folder: Path) -> dict[str, Any]:
    """{kind, n, figures: [Figure…], unrecognised: {model: answers without a label}}; the answers in `folder`.

    Written to `folder`/domain.jsonl. DataError names a row that is not {prompt, label | reference}.
    """
    speakers = [policy, reference] if reference else [policy]
    check_names(*(speaker.name for speaker in speakers))
    rows = read_labelled(options)
    kind = _kind(rows, options)
    prompts, targets = [row.prompt for row in rows], [row.target for row in rows]
    answers = [speaker.answer(prompts, options.temperature) for speaker in speakers]
    unrecognised = {}
    if kind == "labels":
        labels = sorted({normalise(target) for target in targets})
        read = [[find_label(answer, labels, options.pattern) for answer in said] for said in answers]
        unrecognised = {each.name: own.count(NO_LABEL) for each, own in zip(speakers, read, strict=True)}
        measures = label_measures([normalise(target) for target in targets], labels)
    else:
        read = [[_extract(answer, options.pattern) for answer in said] for said in answers]
        measures = text_measures(targets)
    figures = [_figure(name, measure, read, len(rows)) for name, measure in measures.items()]
    write_jsonl(folder / "domain.jsonl", _answer_rows(rows, speakers, answers, read))
    found = [asdict(each) for each in figures]
    return {"kind": kind, "n": len(rows), "figures": found, "unrecognised": unrecognised}


# --- the file ----------------------------------------------------------------------------------------------------


def read_labelled(options: Domain) -> list[Row]:
    """The rows of a JSONL file: `prompt` (text or messages), and `label` or `reference`. DataError names the line."""
    path = Path(options.file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"file={path} cannot be read: {error}") from error
    rows = [_read_row(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if len(rows) < 2:
        raise DataError(f"file={path} has {len(rows)} rows: an interval needs two at least")
    return rows[: options.limit]


def _read_row(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    target = row.get("label", row.get("reference")) if isinstance(row, dict) else None
    if not isinstance(target, str | int | bool) or not isinstance(row.get("prompt"), str | list) or not row["prompt"]:
        raise DataError(f"{where} must have prompt (text or messages) and label or reference (one text)")
    return Row(row["prompt"], str(target))


def _kind(rows: Sequence[Row], options: Domain) -> str:
    if options.kind != "auto":
        return options.kind
    different = len({normalise(row.target) for row in rows})
    return "labels" if different <= MOST_LABELS and 2 * different <= len(rows) else "texts"


# --- reading answers ---------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """A text as it is compared: one case, one width, single spaces, no quotes or full stop around it."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(" .!\"'`*“”‘’。")


def find_label(answer: str, labels: Sequence[str], pattern: str | None = None) -> str:
    """The one normalised label that an answer names; `(none)` where it names none or several.

    Where `pattern` is given, only what it finds counts.
    """
    said = normalise(_extract(answer, pattern))
    if said in labels or pattern:
        return said if said in labels else NO_LABEL
    # the longest first, and each place once: "not spam" does not name "spam"
    alternatives = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True) if label)
    named = set(re.findall(rf"(?<!\w)(?:{alternatives})(?!\w)", said)) if alternatives else set()
    return named.pop() if len(named) == 1 else NO_LABEL


def _extract(answer: str, pattern: str | None) -> str:
    """What `pattern` finds last in an answer (its group where it has one); nothing where it finds nothing."""
    found = list(re.finditer(pattern, answer)) if pattern else []
    if pattern:
        return found[-1].group(found[-1].re.groups) or "" if found else ""
    return answer.strip()


# --- measures: each maps the answers to a function of row numbers ------------------------------------------------

Indexed = Callable[[Any], float]  # a figure of the rows whose numbers it is given, some of them several times
Measure = Callable[[Sequence[str]], Indexed]


def label_measures(targets: Sequence[str], labels: Sequence[str]) -> dict[str, Measure]:
    """Accuracy, and precision, recall and F1 averaged over the labels; an answer without a label counts as wrong."""

    def accuracy(read: Sequence[str]) -> Indexed:
        return _mean_of([float(said == target) for said, target in zip(read, targets, strict=True)])

    def macro(place: int) -> Measure:
        def measure(read: Sequence[str]) -> Indexed:
            import numpy as np

            codes, size = {label: number for number, label in enumerate([*labels, NO_LABEL])}, len(labels) + 1
            cells = np.array([codes[to] * size + codes[said] for to, said in zip(targets, read, strict=True)])
            return lambda rows: _macro(np.bincount(cells[rows], minlength=size * size).reshape(size, size), place)

        return measure

    return {"accuracy": accuracy, "precision (macro)": macro(0), "recall (macro)": macro(1), "F1 (macro)": macro(2)}


def _macro(confusion: Any, place: int) -> float:
    """Mean precision, recall or F1 over the labels that were there or were said, of a (true, said) table of counts.

    The last row and column stand for no label. 0 where a label's denominator is, as scikit-learn has it.
    """
    import numpy as np

    right = np.diag(confusion)[:-1]
    said, there = confusion.sum(0)[:-1], confusion.sum(1)[:-1]
    below = (said, there, (said + there) / 2)[place]
    met = said + there > 0
    return float(np.mean(right[met] / np.maximum(below[met], 0.5)))


def text_measures(targets: Sequence[str]) -> dict[str, Measure]:
    """Exact match, BLEU (0 to 100, sacrebleu's defaults) and ROUGE-1, -2, -L (F-measure)."""

    def exact(read: Sequence[str]) -> Indexed:
        return _mean_of([float(normalise(said) == normalise(to)) for said, to in zip(read, targets, strict=True)])

    def rouge(name: str) -> Measure:
        def measure(read: Sequence[str]) -> Indexed:
            scorer = _rouge_scorer(name)
            pairs = zip(targets, read, strict=True)
            return _mean_of([scorer.score(target, said)[name].fmeasure for target, said in pairs])

        return measure

    return {"exact match": exact, "BLEU": lambda read: _bleu(read, targets)} | {
        name.replace("rouge", "ROUGE-"): rouge(name) for name in ("rouge1", "rouge2", "rougeL")
    }


def _bleu(read: Sequence[str], targets: Sequence[str]) -> Indexed:
    """Corpus BLEU of any choice of rows, from each row's n-gram counts."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise _missing("sacrebleu") from error
    import numpy as np

    bleu = BLEU(effective_order=True)  # of single rows; the counts are the same
    scores = [bleu.sentence_score(said, [target]) for said, target in zip(read, targets, strict=True)]
    counts = np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in scores])

    def figure(rows: Any) -> float:
        total = counts[rows].sum(0).tolist()
        return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score)

    return figure


class _Words:
    """Words of any script, lower case (rouge-score's own tokenizer knows a to z and 0 to 9 only)."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _rouge_scorer(name: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge_score") from error
    return RougeScorer([name], tokenizer=_Words())


def _missing(package: str) -> ConfigError:
    return ConfigError(missing_package("the domain metric", package) or f"{package} cannot be imported")


def _mean_of(values: Sequence[float]) -> Indexed:
    import numpy as np

    array = np.array(values)
    return lambda rows: float(array[rows].mean())


def _figure(name: str, measure: Measure, read: Sequence[Sequence[str]], count: int) -> Figure:
    import numpy as np

    found = [measure(own) for own in read]
    generator, everything = np.random.default_rng(0), np.arange(count)
    whole = [figure(everything) for figure in found]
    drawn = (generator.integers(count, size=count) for _ in range(DRAWS))
    draws = np.array([[figure(rows) for figure in found] for rows in drawn])  # the same rows for both: paired
    low, high = np.quantile(draws[:, 0], [0.025, 0.975]).tolist()
    if len(read) == 1:
        return Figure(name, whole[0], low, high, None, None, None, None, count)
    less, more = np.quantile(draws[:, 0] - draws[:, 1], [0.025, 0.975]).tolist()
    return Figure(name, whole[0], low, high, whole[1], whole[0] - whole[1], less, more, count)


def _answer_rows(
    rows: Sequence[Row], speakers: Sequence[Speaker], answers: Sequence[Sequence[str]], read: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    return [
        {"prompt": row.prompt, "target": row.target}
        | {speaker.name: {"answer": said[number], "read_as": own[number]}
           for speaker, said, own in zip(speakers, answers, read, strict=True)}
        for number, row in enumerate(rows)
    ]  # fmt: skip
