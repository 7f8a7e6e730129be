"""An order of thumbs-up and thumbs-down rows in which KTO can learn.

TRL unpairs in blocks of one class and reads them in order, so that its batches have one class and its KL estimate may
pair an answer with its own prompt. Here the classes are spread evenly, and no two rows of a prompt stand side by side.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from dpo_kit.data.rows import Rows


def unpair(pairs: Iterable[dict[str, Any]]) -> Rows:
    """Each pair as its chosen row (label true) and its rejected row (label false)."""
    rows = []
    for pair in pairs:
        rest = {key: value for key, value in pair.items() if key not in ("chosen", "rejected")}
        for side in ("chosen", "rejected"):
            row = rest | {"completion": pair[side], "label": side == "chosen"}
            if ids := pair.get("ids"):
                row["ids"] = {"prompt": ids["prompt"], "completion": ids[side]}
            if lengths := pair.get("tokens"):
                row["tokens"] = {"prompt": lengths["prompt"], "completion": lengths[side], "cut": lengths["cut"]}
            rows.append(row)
    return rows


def interleave(rows: Rows, seed: int) -> Rows:
    """`rows` with both classes spread evenly and, where possible, no two neighbours of one prompt."""
    up = _spread_prompts([row for row in rows if row["label"]], random.Random(seed))
    down = _spread_prompts([row for row in rows if not row["label"]], random.Random(seed))
    # both classes of pairs are in one order, so that half a turn sets chosen and rejected half the data apart
    turn = len(down) // 2 if up else 0
    classes = (up, down[turn:] + down[:turn])
    places = sorted(((i + 0.5) / len(part), side, i) for side, part in enumerate(classes) for i in range(len(part)))
    return _part_neighbours([classes[side][i] for _, side, i in places])


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


def _part_neighbours(rows: Rows) -> Rows:
    """Swap a row that follows one of its own prompt with the nearest row of the same class that parts them."""
    rows = list(rows)

    def meets_its_prompt(k: int) -> bool:
        return 0 < k < len(rows) and rows[k]["prompt_id"] == rows[k - 1]["prompt_id"]

    for i in range(1, len(rows)):
        near = (i + sign * distance for distance in range(1, 500) for sign in (1, -1)) if meets_its_prompt(i) else ()
        for j in near:
            if 0 <= j < len(rows) and rows[i]["label"] == rows[j]["label"]:
                rows[i], rows[j] = rows[j], rows[i]
                if not any(map(meets_its_prompt, (i, i + 1, j, j + 1))):
                    break
                rows[i], rows[j] = rows[j], rows[i]
    return rows
