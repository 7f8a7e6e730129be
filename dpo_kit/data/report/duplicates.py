"""What stands in the data twice: copies, and pairs that contradict each other (near.py: what is nearly so)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.data.context import BESIDE
from dpo_kit.data.report.figures import agreement_of
from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.model.chats import text_of


@dataclass
class Copies:
    """Indices of rows: each further copy with its first, and the groups in which labels contradict each other."""

    first: dict[int, int] = field(default_factory=dict)
    contradictions: list[list[int]] = field(default_factory=list)


def content_keys(rows: Rows, kind: Kind) -> list[tuple[str, ...]]:
    """(prompt, chosen, rejected) or (prompt, completion) of each row as hashes of their text, of a prompt with the
    columns that belong to it.
    """
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


def find_copies(rows: Rows, kind: Kind, keys: list[tuple[str, ...]], order: Sequence[int]) -> Copies:
    """Rows with equal texts. Of several copies the first in `order` is the one that the others are copies of."""
    copies = Copies()
    verdicts: dict[tuple[str, ...], dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in order:
        prompt, *answers = keys[index]
        verdict = rows[index]["label"] if kind == "unary" else tuple(answers)
        verdicts[prompt, *sorted(answers)][verdict].append(index)
    for sides in verdicts.values():
        for first, *more in sides.values():
            copies.first |= dict.fromkeys(more, first)
        if len(sides) > 1:
            copies.contradictions.append([index for side in sides.values() for index in side])
    return copies
