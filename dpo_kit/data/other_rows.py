"""What methods train on that take no pairs: thumbs in KTO's order, and prompts whose answers are drawn meanwhile."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from dpo_kit.data.prepare import in_turns
from dpo_kit.data.read import Fault
from dpo_kit.data.rows import Rows

# --- thumbs of KTO -----------------------------------------------------------------------------------------------
# TRL unpairs in blocks of one class and reads them in order, so that its batches have one class and its KL estimate may
# pair an answer with its own prompt. Here classes are spread evenly, and no two rows of a prompt stand side by side.


def unpair(pairs: Iterable[dict[str, Any]]) -> Rows:
    """Each pair as its chosen row (label true) and its rejected row (label false)."""
    rows = []
    for pair in pairs:
        rest = {key: value for key, value in pair.items() if key not in ("chosen", "rejected")}
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            row = rest | {"completion": pair[side], "label": side == "chosen"}
            for name in ("ids", "tokens"):
                if of_pair := pair.get(name):
                    row[name] = {"completion" if key == side else key: of_pair[key] for key in of_pair if key != other}
            rows.append(row)
    return rows


def interleave(rows: Rows, seed: int) -> Rows:
    """`rows` in an order for KTO: both classes spread evenly and, where possible, no two neighbours of one prompt."""
    classes = []
    for label in (True, False):
        by_prompt: dict[str, Rows] = defaultdict(list)
        for row in rows:
            if row["label"] == label:
                by_prompt[row["prompt_id"]].append(row)
        groups, rng = list(by_prompt.values()), random.Random(seed)
        rng.shuffle(groups)
        for group in groups:
            rng.shuffle(group)
        classes.append(in_turns(groups))
    up, down = classes
    # both classes of pairs are in one order, so that half a turn sets chosen and rejected half the data apart
    turn = len(down) // 2 if up else 0
    classes = [up, down[turn:] + down[:turn]]
    places = sorted(((i + 0.5) / len(part), side, i) for side, part in enumerate(classes) for i in range(len(part)))
    return _part_neighbours([classes[side][i] for _, side, i in places])


def _part_neighbours(rows: Rows) -> Rows:
    """Swap a row that follows one of its own prompt with the nearest row of the same class that parts them."""

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


# --- prompts whose answers are drawn while training --------------------------------------------------------------


def distinct_prompts(rows: Rows) -> Rows:
    """The first row of each prompt, in their order."""
    return list({row["prompt_id"]: row for row in reversed(rows)}.values())[::-1]


def as_prompts(rows: Rows, tokenizer: Any, room: int | None, faults: list[Fault]) -> Rows:
    """`rows` without answers; prompts of more than `room` tokens, as a model is asked them, go to `faults`: TRL would
    cut such a prompt in the loss, but not where it draws the answer.
    """
    from dpo_kit.model.tokens import encode_prompts

    kept = []
    for row, ids in zip(rows, encode_prompts(tokenizer, [row["prompt"] for row in rows]), strict=True):
        if room is not None and len(ids) > room:
            reason, length = "prompt leaves no room for an answer", f"{len(ids)} prompt tokens"
            remedy = f"at most {room} fit: raise trl.max_length, or lower trl.max_new_tokens"
            faults.append(Fault(row["_place"], reason, length, remedy))
        else:
            bare = {name: row[name] for name in ("prompt", "prompt_id", "_place")}
            kept.append(bare | {"tokens": {"prompt": len(ids), "cut": False}})
    return kept


def with_answer_lengths(rows: Sequence[dict[str, Any]], max_new_tokens: int | None) -> Rows:
    """`rows` whose token counts include their answers: of those that are drawn, two of the longest that may be."""
    fresh = {"first": max_new_tokens, "second": max_new_tokens}
    bare = {"prompt", "cut"}
    return [row if row["tokens"].keys() - bare else row | {"tokens": row["tokens"] | fresh} for row in rows]
