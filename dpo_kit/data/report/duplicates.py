"""What stands in the data twice: copies, pairs that contradict each other, prompts that training shares with what it
will be measured on (near.py: what is nearly so).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dpo_kit.data.context import BESIDE
from dpo_kit.data.read import read_whole
from dpo_kit.data.report.figures import agreement_of
from dpo_kit.data.report.text_rules import words_of
from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.errors import DataError
from dpo_kit.model.chats import text_of

LEAST_TURN = 6  # words of a turn that is compared by itself; everybody says "Please go on"
COLUMNS = ("prompt", "question", "instruction", "turns", "input", "text", "messages")


def content_keys(rows: Rows, kind: Kind) -> list[tuple[str, ...]]:
    """Hashes of each row's texts: (prompt with the columns beside it, chosen, rejected) or (prompt, completion)."""
    return [
        (_hash(beside(row) + text_of(row["prompt"])), *(_hash(text_of(row[n])) for n in ANSWERS[kind])) for row in rows
    ]


def beside(row: dict[str, Any]) -> str:
    """The columns of a row that belong to its prompt, as text."""
    return "".join(f"{row[name]}\n" for name in BESIDE if row.get(name))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def rank(rows: Rows, keys: list[tuple[str, ...]]) -> list[int]:
    """Indices with the surest label first, then by content: an order that does not depend on the file's."""
    sure = [-(agreement_of(row) or 0.0) for row in rows]
    return sorted(range(len(rows)), key=lambda index: (sure[index], keys[index]))


def find_copies(
    rows: Rows, kind: Kind, keys: list[tuple[str, ...]], order: Sequence[int]
) -> tuple[dict[int, int], list[list[int]]]:
    """Rows with equal texts: {each copy: its first in `order`}, and groups whose labels contradict each other."""
    first: dict[int, int] = {}
    contradictions: list[list[int]] = []
    verdicts: dict[tuple[str, ...], dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in order:
        prompt, *answers = keys[index]
        verdict = rows[index]["label"] if kind == "unary" else tuple(answers)
        verdicts[prompt, *sorted(answers)][verdict].append(index)
    for sides in verdicts.values():
        for original, *more in sides.values():
            first |= dict.fromkeys(more, original)
        if len(sides) > 1:
            contradictions.append([index for side in sides.values() for index in side])
    return first, contradictions


def read_benchmark(path: str) -> list[str]:
    """Every prompt of a benchmark's file: texts, lists of turns, or chats. Raises DataError."""
    prompts: list[str] = []
    for row in read_whole("data.benchmark", path):
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
