"""Prompts that training shares with what it will be measured on, and how alike the prompts are among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_kit.data.read import Fault, read_source
from dpo_kit.data.report.duplicates import NEAR, PROMPT_BANDS, build_index, cover, jaccard, sketch_prompts, words_of
from dpo_kit.data.rows import Rows
from dpo_kit.errors import DataError
from dpo_kit.model.chats import text_of

LEAST_TURN = 6  # words of a turn that is compared by itself; everybody says "Please go on"
ALIKE = 0.6  # least Jaccard index of prompts in one cluster
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


def find_leaks(train: Rows, prompts: Sequence[str], values: np.ndarray | None = None) -> dict[int, str]:
    """{index of a training row: the prompt that it shares}: equal but for case, punctuation and spacing.

    With `values` (the MinHash values of the rows' prompts) near ones too.
    """
    if not prompts:
        return {}
    known = {tuple(words_of(prompt)): prompt for prompt in reversed(prompts)}
    leaks = {}
    for index, row in enumerate(train):
        turns = turns_of(row["prompt"])  # all that the user says, and each turn that is long enough to be known again
        parts = [words_of("\n".join(turns)), *(words for turn in turns if len(words := words_of(turn)) >= LEAST_TURN)]
        shared = next((known[key] for key in map(tuple, parts) if key in known), None)
        if shared is not None:
            leaks[index] = shared
    if values is None:
        return leaks
    held = list(dict.fromkeys(prompts))
    lsh, minhash = build_index(sketch_prompts(held), PROMPT_BANDS, range(len(held)))
    for text, rows in zip(*group_by_prompt(train), strict=True):
        if rows[0] not in leaks:
            near = (held[index] for index in sorted(lsh.query(minhash(values[rows[0]]))))
            shared = next((prompt for prompt in near if jaccard(text, prompt) >= NEAR), None)
            leaks |= dict.fromkeys(rows, shared) if shared is not None else {}
    return leaks


def group_by_prompt(rows: Rows) -> tuple[list[str], list[list[int]]]:
    """Each different prompt's text, and the indices of the rows that have it."""
    owners: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        owners.setdefault(text_of(row["prompt"]), []).append(index)
    return list(owners), list(owners.values())


def cluster_prompts(texts: Sequence[str], values: np.ndarray) -> list[int]:
    """For each text the index of its cluster's first one: texts that are alike (Jaccard index of ALIKE or more).

    `values` are their MinHash values, (texts, PERMUTATIONS).
    """
    leader, _ = cover(values, PROMPT_BANDS, range(len(texts)), lambda i, j: jaccard(texts[i], texts[j]) >= ALIKE)
    return [leader.get(index, index) for index in range(len(texts))]
