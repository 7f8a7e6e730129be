"""How far rules that need no understanding get: each is a classifier that names the chosen answer by one property.

A policy learns what separates chosen from rejected, whatever it is. A rule that is right far more (or far less) often
than half of the time is such a difference (length: arXiv:2310.03716; lists, bold, refusals and more: arXiv:2409.11704).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_kit.data.report.text_rules import code_blocks, is_refusal, list_items, markdown_signs, script_of
from dpo_kit.data.rows import Rows
from dpo_kit.model.chats import text_of
from dpo_kit.run.intervals import wilson

# what each rule holds for the better answer: the one with the larger value
RULES: dict[str, Callable[[str, str], float]] = {
    "longer (characters)": lambda answer, prompt: len(answer),
    "more list items": lambda answer, prompt: list_items(answer),
    "more markdown": lambda answer, prompt: markdown_signs(answer),
    "more code blocks": lambda answer, prompt: code_blocks(answer),
    "no refusal": lambda answer, prompt: not is_refusal(answer),
    "the prompt's script": lambda answer, prompt: script_of(answer) == script_of(prompt),
}


def measure_shortcuts(rows: Rows) -> dict[str, dict[str, float]]:
    """For each rule: `accuracy` on all pairs (½ where it cannot tell) with its Wilson 95 % interval `low` to `high`,
    and `decides`, the share of pairs in which it names one answer.
    """
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
    prompt = row["prompt"]
    text = text_of(prompt)
    replies = [text_of(row[name]) for name in answers]
    holds = {
        "several turns": not isinstance(prompt, str) and sum(message["role"] == "user" for message in prompt) > 1,
        "system prompt": not isinstance(prompt, str) and prompt[0]["role"] in ("system", "developer"),
        "prompt of one or two words": len(text.split(None, 2)) < 3,
        "very long prompt": len(text) > 4000,
        "script other than Latin": script_of(text) != "Latin",
        "code": "```" in text or any("```" in reply for reply in replies),
        "refusal": any(map(is_refusal, replies)),
    }
    return [name for name, is_so in holds.items() if is_so]
