"""An order of thumbs-up and thumbs-down rows in which KTO can learn.

TRL unpairs in blocks of one class and reads them in order, so that its batches have one class and its KL estimate may
pair an answer with its own prompt. Here the classes are spread evenly, and no two rows of a prompt stand side by side.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Rows = list[dict[str, Any]]


def unpair(pairs: Iterable[dict[str, Any]]) -> Rows:
    """Each pair as its chosen row (label true) and its rejected row (label false)."""
    return [_one_of(pair, side) for pair in pairs for side in ("chosen", "rejected")]


def _one_of(pair: dict[str, Any], side: str) -> dict[str, Any]:
    row = {key: value for key, value in pair.items() if key not in ("chosen", "rejected")}
    row |= {"completion": pair[side], "label": side == "chosen"}
    if ids := pair.get("ids"):
        row["ids"] = {"prompt": ids["prompt"], "completion": ids[side]}
    if lengths := pair.get("tokens"):
        row["tokens"] = {"prompt": lengths["prompt"], "completion": lengths[side], "cut": lengths["cut"]}
    return row


def interleave(rows: Rows, seed: int) -> Rows:
    """`rows` with both classes spread evenly and, where possible, no two neighbours of one prompt."""
    shuffle = random.Random(seed)
    up = _spread_prompts([row for row in rows if row["label"]], shuffle)
    down = _spread_prompts([row for row in rows if not row["label"]], shuffle)
    turn = len(down) // 2 if up else 0  # chosen and rejected of one prompt half the data apart
    return _part_neighbours(_merge(up, down[turn:] + down[:turn]))


def _spread_prompts(rows: Rows, shuffle: random.Random) -> Rows:
    """Shuffled; first one row of every prompt, then the second rows, and so on."""
    by_prompt: dict[str, Rows] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt_id"]].append(row)
    groups = list(by_prompt.values())
    shuffle.shuffle(groups)
    for group in groups:
        shuffle.shuffle(group)
    rounds = max((len(group) for group in groups), default=0)
    return [group[turn] for turn in range(rounds) for group in groups if turn < len(group)]


def _merge(up: Rows, down: Rows) -> Rows:
    """Both lists in their order, each spread evenly over the whole."""
    places = [((i + 0.5) / len(up), 0, i) for i in range(len(up))]
    places += [((i + 0.5) / len(down), 1, i) for i in range(len(down))]
    return [(up, down)[side][i] for _, side, i in sorted(places)]


def _part_neighbours(rows: Rows) -> Rows:
    """Swap a row that follows one of its own prompt with the nearest row of the same class that parts them."""
    rows = list(rows)
    for i in range(1, len(rows)):
        if rows[i]["prompt_id"] == rows[i - 1]["prompt_id"]:
            near = (i + sign * distance for distance in range(1, 500) for sign in (1, -1))
            j = next((k for k in near if 0 <= k < len(rows) and _parts(rows, i, k)), i)
            rows[i], rows[j] = rows[j], rows[i]
    return rows


def _parts(rows: Rows, i: int, j: int) -> bool:
    if rows[i]["label"] != rows[j]["label"]:
        return False
    swapped = {i: rows[j]["prompt_id"], j: rows[i]["prompt_id"]}

    def prompt(k: int) -> str | None:
        return swapped.get(k, rows[k]["prompt_id"]) if 0 <= k < len(rows) else None

    return all(prompt(k) != prompt(k + d) for k in (i, j) for d in (-1, 1))
