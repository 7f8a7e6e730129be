"""Prompts that training shares with what it will be measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_kit.data.read import Fault, read_source
from dpo_kit.data.report.text_rules import words_of
from dpo_kit.data.rows import Rows
from dpo_kit.errors import DataError

LEAST_TURN = 6  # words of a turn that is compared by itself; everybody says "Please go on"
COLUMNS = ("prompt", "question", "instruction", "turns", "input", "text", "messages")


def read_benchmark(path: str) -> list[str]:
    """Every prompt of a benchmark's file: texts, lists of turns, or chats. Raises DataError."""
    prompts: list[str] = []
    for row in read_source(path, "test"):
        if isinstance(row, Fault):
            raise DataError(f"data.benchmark: {row}")
        column = next((name for name in COLUMNS if row.values.get(name)), None)
        if column is None:
            raise DataError(
                f"data.benchmark: {row.place} has none of the columns {', '.join(COLUMNS)}: name its prompts prompt"
            )
        prompts += turns_of(row.values[column])
    return prompts


def held_prompts(rows: Rows) -> list[str]:
    """What the user says in each row's prompt, all turns together."""
    return ["\n".join(turns_of(row["prompt"])) for row in rows]


def turns_of(prompt: Any) -> list[str]:
    """What a user says in `prompt`: a text, a list of texts, or chat messages."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    users = (item for item in prompt if isinstance(item, dict) and item.get("role") == "user")
    return [text for text in [*texts, *(str(message.get("content") or "") for message in users)] if text]


def find_leaks(train: Rows, prompts: Sequence[str]) -> dict[int, str]:
    """{index of a training row: the prompt that it shares}: equal but for case, punctuation and spacing."""
    known = {tuple(words_of(prompt)): prompt for prompt in reversed(prompts)}
    leaks = {}
    for index, row in enumerate(train if known else ()):
        turns = turns_of(row["prompt"])  # all that the user says, and each turn that is long enough to be known again
        parts = [words_of("\n".join(turns)), *(words for turn in turns if len(words := words_of(turn)) >= LEAST_TURN)]
        shared = next((known[key] for key in map(tuple, parts) if key in known), None)
        if shared is not None:
            leaks[index] = shared
    return leaks
