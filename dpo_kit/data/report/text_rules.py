"""What is seen of an answer by its text alone, and how far rules that need no understanding get.

A policy learns what separates chosen from rejected, whatever it is. A rule that is right far more (or far less) often
than half of the time is such a difference (length: arXiv:2310.03716; lists, bold, refusals and more: arXiv:2409.11704).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_kit.data.rows import Rows
from dpo_kit.model.chats import text_of
from dpo_kit.run.intervals import wilson

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
