"""What stands in the data twice: copies, contradictions, prompts shared with what is measured on (near.py: nearly)."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dpo_kit.data.read import read_whole
from dpo_kit.data.report.figures import agreement_of, words_of
from dpo_kit.data.rows import ANSWERS, BESIDE, Kind, Rows
from dpo_kit.errors import DataError
from dpo_kit.model.chats import text_of

LEAST_TURN = 6  # words of a turn that is compared by itself; everybody says "Please go on"
COLUMNS = ("prompt", "question", "instruction", "turns", "input", "text", "messages")


def find_copies(rows: Rows, kind: Kind) -> tuple[list[int], dict[int, int], list[list[int]]]:
    """An order of the rows (not the file's: the surest label first, then by content), {each copy: the first row in it
    with equal texts}, and groups of rows with equal texts whose labels contradict each other.
    """
    keys = []
    for row in rows:
        texts = (beside(row) + text_of(row["prompt"]), *(text_of(row[name]) for name in ANSWERS[kind]))
        hashes = tuple(hashlib.blake2b(text.encode(), digest_size=12).hexdigest() for text in texts)
        keys.append((-(agreement_of(row) or 0.0), hashes))
    order = sorted(range(len(rows)), key=keys.__getitem__)
    verdicts: dict[tuple[str, ...], dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in order:
        prompt, *answers = keys[index][1]
        verdict = rows[index]["label"] if kind == "unary" else tuple(answers)
        verdicts[prompt, *sorted(answers)][verdict].append(index)
    first = {index: same[0] for sides in verdicts.values() for same in sides.values() for index in same[1:]}
    crossed = [[index for same in sides.values() for index in same] for sides in verdicts.values() if len(sides) > 1]
    return order, first, crossed


def beside(row: dict[str, Any]) -> str:
    """The columns of a row that belong to its prompt, as text."""
    return "".join(f"{row[name]}\n" for name in BESIDE if row.get(name))


def read_benchmark(path: str) -> list[str]:
    """Every prompt of a benchmark's file: texts, lists of turns, or chats. Raises DataError."""
    prompts: list[str] = []
    for row in read_whole("data.benchmark", path):
        column = next((name for name in COLUMNS if row.values.get(name)), None)
        if column is None:
            has = f"has none of the columns {', '.join(COLUMNS)}: name its prompts prompt"
            raise DataError(f"data.benchmark: {row.place} {has}")
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
    return [text for text in (*texts, *(str(message.get("content") or "") for message in users)) if text]


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
