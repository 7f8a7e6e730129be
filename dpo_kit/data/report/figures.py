"""What columns of rows say (lengths, rater agreement, score gaps, sources, classes), what is seen of an answer by its
text alone, and how far rules get that need no understanding. Pure functions.

A policy learns what separates chosen from rejected, whatever it is. A rule that is right far more (or far less) often
than half of the time is such a difference (length: arXiv:2310.03716; lists, bold, refusals and more: arXiv:2409.11704).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.model.chats import text_of
from dpo_kit.run.intervals import wilson

SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
SOURCES = ("source", "dataset", "subset", "category", "domain", "task", "topic", "language", "chosen_model")


def lengths(rows: Rows, kind: Kind) -> dict[str, Any]:
    """Token counts of each column, and how many rows `max_length` cuts."""
    return {
        "cut_at_max_length": sum(row["tokens"]["cut"] for row in rows),
        "tokens": {name: spread([row["tokens"][name] for row in rows]) for name in ("prompt", *ANSWERS[kind])},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles, maximum and mean."""
    points = np.percentile(values, [5, 25, 50, 75, 95], method="inverted_cdf").tolist()
    named = dict(zip(("p5", "p25", "median", "p75", "p95"), points, strict=True))
    return named | {"max": max(values), "mean": fmean(values)}


def agreement_of(row: dict[str, Any]) -> float | None:
    """The share of raters (or a judge's probability) behind the label: `agreement`, else of `votes`, a list of votes
    (true, 1 or "chosen" for the label) or {"chosen": n, "rejected": m}.
    """
    share, votes = number(row.get("agreement")), row.get("votes")
    if share is None and isinstance(votes, dict):
        chosen, rejected = (number(votes.get(name)) or 0.0 for name in ("chosen", "rejected"))
        share = chosen / (chosen + rejected) if chosen + rejected > 0 else None
    elif share is None and isinstance(votes, list) and votes:
        share = sum(vote in (True, 1, "chosen") for vote in votes) / len(votes)
    return share if share is not None and 0 <= share <= 1 else None


def scores_of(row: dict[str, Any]) -> tuple[float, float] | None:
    """The ratings of chosen and rejected, where the row has both."""
    for names in SCORES:
        chosen, rejected = (number(row.get(name)) for name in names)
        if chosen is not None and rejected is not None:
            return chosen, rejected
    return None


def number(value: Any) -> float | None:
    """`value` as a finite number, also where it is written as text; None where it is none."""
    try:
        given = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return given if math.isfinite(given) else None


def measure_agreement(rows: Rows) -> dict[str, Any] | None:
    """How sure the labels are; None where no row says it. `noise` is the mean share of votes against the label: about
    that share of single raters would have labelled otherwise, and no policy can be expected to agree with them.
    """
    shares = [share for row in rows if (share := agreement_of(row)) is not None]
    if not shares:
        return None
    tenths = Counter(min(9, math.floor(10 * share + 1e-9)) for share in shares)
    return {
        "rows": len(shares),
        "mean": fmean(shares),
        "noise": 1 - fmean(shares),
        "below_0.7": fmean([share < 0.7 for share in shares]),
        "below_half": fmean([share < 0.5 for share in shares]),
        "histogram": [[tenth / 10, tenths[tenth]] for tenth in range(10)],
    }


def measure_scores(rows: Rows) -> dict[str, Any] | None:
    """Chosen minus rejected rating; `ties` and `reversed` are shares. None where no row has ratings."""
    gaps = [scores[0] - scores[1] for row in rows if (scores := scores_of(row)) is not None]
    if not gaps:
        return None
    ties, turned = fmean([gap == 0 for gap in gaps]), fmean([gap < 0 for gap in gaps])
    return {"rows": len(gaps), "gap": spread(gaps), "ties": ties, "reversed": turned}


def measure_balance(rows: Rows) -> dict[str, Any]:
    """For each column that names a source or a category: how many values it has, and the largest with their rows."""
    counts = {name: Counter(str(row[name]) for row in rows if row.get(name) is not None) for name in SOURCES}
    return {name: {"values": len(of), "largest": dict(of.most_common(10))} for name, of in counts.items() if of}


def measure_classes(rows: Rows) -> dict[str, Any]:
    """Thumbs up and down, and weights with which n_up·w_up : n_down·w_down is within 1:1 and 4:3 (KTO,
    arXiv:2402.01306, section 4.2): the scarcer class is given more, the other stays at 1.
    """
    up = sum(row["label"] for row in rows)
    down = len(rows) - up
    weights = {"desirable_weight": [1.0, 1.0], "undesirable_weight": [1.0, 1.0]}
    if up and down and up < down:
        weights["desirable_weight"] = [down / up, 4 * down / (3 * up)]
    elif up and down and 3 * up > 4 * down:
        weights["undesirable_weight"] = [3 * up / (4 * down), up / down]
    return {"desirable": up, "undesirable": down, "weights": weights}


# --- texts -------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # scripts without spaces: every character is a word
_ITEM = re.compile(r"(?:^|\n)[ \t]*(?:[-*•+]|\d{1,2}[.)])[ \t]+\S")
_HEADING = re.compile(r"(?:^|\n)#{1,6} |\*\*\S|\n\|")  # or a bold word, or a row of a table
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:unable|not able)|i(?:'m| am) sorry,? but|i (?:can(?:no|')t|won't|will not|must decline)"
    r"|as an? (?:ai|language model)|i do(?:n't| not) feel comfortable)"
)
_SCRIPTS = {
    "Cyrillic": "\u0400-\u052f", "Greek": "\u0370-\u03ff", "Arabic": "\u0600-\u06ff", "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f", "Thai": "\u0e00-\u0e7f", "Hangul": "\uac00-\ud7af", "Japanese": "\u3040-\u30ff",
    "Han": "\u4e00-\u9fff",
}  # fmt: skip


def list_items(text: str) -> int:
    """Bulleted and numbered lines."""
    return len(_ITEM.findall(text))


def is_refusal(text: str) -> bool:
    """Whether the answer begins like a refusal, in English."""
    return bool(_REFUSAL.search(text[:200].lower().replace("’", "'")))


def script_of(text: str) -> str:
    """The script that most letters beyond Latin belong to; Latin where there are hardly any."""
    if text.isascii():
        return "Latin"
    counts = {name: len(re.findall(f"[{letters}]", text)) for name, letters in _SCRIPTS.items()}
    name = max(counts, key=counts.__getitem__)
    return name if 3 * counts[name] > len(text.split()) else "Latin"


def words_of(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return _WORD.findall(text.lower())


# what each rule holds for the better answer: the one with the larger value
RULES: dict[str, Callable[[str, str], float]] = {
    "longer (characters)": lambda answer, prompt: len(answer),
    "more list items": lambda answer, prompt: list_items(answer),
    "more markdown": lambda answer, prompt: len(_HEADING.findall(answer)),
    "more code blocks": lambda answer, prompt: answer.count("```") // 2,
    "no refusal": lambda answer, prompt: not is_refusal(answer),
    "the prompt's script": lambda answer, prompt: script_of(answer) == script_of(prompt),
}


def measure_shortcuts(rows: Rows) -> dict[str, dict[str, float]]:
    """For each rule `accuracy` (½ where it cannot tell), its Wilson interval, and `decides`, the share it tells."""
    gaps = np.zeros((len(RULES) + 1, len(rows)))  # tokens first
    for column, row in enumerate(rows):
        prompt, chosen, rejected = (text_of(row[name]) for name in ("prompt", "chosen", "rejected"))
        gaps[0, column] = row["tokens"]["chosen"] - row["tokens"]["rejected"]
        for line, rule in enumerate(RULES.values(), start=1):
            gaps[line, column] = float(rule(chosen, prompt)) - float(rule(rejected, prompt))
    measures = {}
    for name, gap in zip(("longer (tokens)", *RULES), gaps, strict=True):
        share = float(np.mean((gap > 0) + 0.5 * (gap == 0)))
        low, high = wilson(share, len(gap))
        measures[name] = {"accuracy": share, "low": low, "high": high, "decides": float(np.mean(gap != 0))}
    return measures


def edge_cases(row: dict[str, Any], answers: Sequence[str]) -> list[str]:
    """What makes a row unusual, by name."""
    text, replies = text_of(row["prompt"]), [text_of(row[name]) for name in answers]
    roles = [] if isinstance(row["prompt"], str) else [message["role"] for message in row["prompt"]]
    holds = {
        "several turns": roles.count("user") > 1,
        "system prompt": roles[:1] in (["system"], ["developer"]),
        "prompt of one or two words": len(text.split(None, 2)) < 3,
        "very long prompt": len(text) > 4000,
        "script other than Latin": script_of(text) != "Latin",
        "code": "```" in text or any("```" in reply for reply in replies),
        "refusal": any(map(is_refusal, replies)),
    }
    return [name for name, is_so in holds.items() if is_so]
