"""What is seen of an answer by its text alone, without understanding: lists, markdown, code, refusals, scripts."""

from __future__ import annotations

import re

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # scripts without spaces: every character is a word
_ITEM = re.compile(r"(?:^|\n)[ \t]*(?:[-*•+]|\d{1,2}[.)])[ \t]+\S")
_HEADING = re.compile(r"(?:^|\n)#{1,6} |\*\*\S|\n\|")
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:unable|not able)|i(?:'m| am) sorry,? but|i (?:can(?:no|')t|won't|will not|must decline)"
    r"|as an? (?:ai|language model)|i do(?:n't| not) feel comfortable)"
)
_SCRIPTS = {
    "Cyrillic": re.compile(r"[\u0400-\u052f]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
    "Hangul": re.compile(r"[\uac00-\ud7af]"),
    "Japanese": re.compile(r"[\u3040-\u30ff]"),
    "Han": re.compile(r"[\u4e00-\u9fff]"),
}


def list_items(text: str) -> int:
    """Bulleted and numbered lines."""
    return len(_ITEM.findall(text))


def markdown_signs(text: str) -> int:
    """Headings, bold words and rows of tables."""
    return len(_HEADING.findall(text)) if "**" in text or "#" in text or "|" in text else 0


def code_blocks(text: str) -> int:
    """Pairs of fences."""
    return text.count("```") // 2


def is_refusal(text: str) -> bool:
    """Whether the answer begins like a refusal, in English."""
    return bool(_REFUSAL.search(text[:200].lower().replace("’", "'")))


def script_of(text: str) -> str:
    """The script that most letters beyond Latin belong to; Latin where there are hardly any."""
    if text.isascii():
        return "Latin"
    counts = {name: len(letters.findall(text)) for name, letters in _SCRIPTS.items()}
    name = max(counts, key=counts.__getitem__)
    return name if 3 * counts[name] > len(text.split()) else "Latin"


def words_of(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return _WORD.findall(text.lower())
