"""What stands in the data twice: copies, near-duplicates, pairs that contradict each other, prompts that leak.

Two texts are near when their sets of three-word shingles (case, punctuation and spacing ignored) overlap by a Jaccard
index of NEAR or more; two rows are when each of their fields is. MinHash (datasketch; arXiv:2107.06499 for its use on
training text) proposes candidates, the exact index decides, so nothing is called a duplicate by chance.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from dpo_kit.data.context import BESIDE
from dpo_kit.data.report.figures import agreement_of
from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.model.chats import text_of

NEAR = 0.8  # least Jaccard index of near texts
ROW_BANDS, PROMPT_BANDS = (10, 4), (13, 3)  # bands x rows: 99.5 % of the rows at .8 are proposed, 96 % of prompts at .6
PERMUTATIONS = 40
CROWD = 50  # members of a bucket that each further one is compared with
CHUNK = 2000
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # scripts without spaces: every character is a word
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xBF58476D1CE4E5B9], np.uint64)


# --- equal -------------------------------------------------------------------------------------------------------


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
        (_hash(_beside(row) + text_of(row["prompt"])), *(_hash(text_of(row[n])) for n in ANSWERS[kind])) for row in rows
    ]


def _beside(row: dict[str, Any]) -> str:
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


# --- near --------------------------------------------------------------------------------------------------------


@dataclass
class Near:
    """Indices of rows: each near-duplicate with the row that it is near to, and pairs of rows that nearly contradict
    each other; `left_out` counts comparisons that crowded buckets would have needed besides.
    """

    leader: dict[int, int]
    contradictions: list[tuple[int, int]]
    left_out: int


@dataclass
class Sketch:
    """MinHash values of whole rows and of their prompts, (rows, PERMUTATIONS) each."""

    rows: np.ndarray
    prompts: np.ndarray


def sketch(rows: Rows, kind: Kind) -> Sketch:
    """The MinHash values of all rows, with a bar on a terminal."""
    fields = ([words_of(text_of(row[name])) for name in ("prompt", *ANSWERS[kind])] for row in rows)
    return _sketch(fields, len(rows))


def sketch_prompts(texts: Sequence[str]) -> np.ndarray:
    """The MinHash values of texts alone, (texts, PERMUTATIONS)."""
    return _sketch(([words_of(text), []] for text in texts), len(texts)).prompts


def find_near(rows: Rows, kind: Kind, values: np.ndarray, order: Sequence[int]) -> Near:
    """Near-duplicates among `rows`; each is near to one that stands before it in `order` and is no duplicate itself."""
    contradictions: list[tuple[int, int]] = []

    def same(index: int, other: int) -> bool:
        row, earlier = rows[index], rows[other]
        if not _near(row["prompt"], earlier["prompt"]) or _beside(row) != _beside(earlier):
            return False
        if kind == "unary":
            straight = _near(row["completion"], earlier["completion"])
            crossed = straight and row["label"] != earlier["label"]
        else:
            straight = _near(row["chosen"], earlier["chosen"]) and _near(row["rejected"], earlier["rejected"])
            crossed = not straight and _near(row["chosen"], earlier["rejected"])
            crossed = crossed and _near(row["rejected"], earlier["chosen"])
        if crossed:
            contradictions.append((other, index))
        return straight and not crossed

    leader, left_out = cover(values, ROW_BANDS, order, same)
    return Near(leader, contradictions, left_out)


def cover(
    values: np.ndarray, bands: tuple[int, int], order: Sequence[int], same: Callable[[int, int], bool]
) -> tuple[dict[int, int], int]:
    """({index: leader}, comparisons left out): each index that is `same` as one before it in `order` with no leader."""
    place = {index: rank for rank, index in enumerate(order)}
    before: dict[int, set[int]] = defaultdict(set)
    left_out = 0
    lsh, _ = build_index(values, bands, order)
    for table in lsh.hashtables:
        for key in table.keys():  # noqa: SIM118 - a storage of datasketch, not a dict
            members = sorted(table.get(key), key=place.__getitem__)
            for rank, index in enumerate(members[1:], start=1):
                before[index].update(members[: min(rank, CROWD)])
                left_out += max(0, rank - CROWD)
    leader: dict[int, int] = {}
    for index in sorted(before, key=place.__getitem__):
        others = sorted((other for other in before[index] if other not in leader), key=place.__getitem__)
        first = next((other for other in others if same(index, other)), None)
        if first is not None:
            leader[index] = first
    return leader, left_out


def build_index(
    values: np.ndarray, bands: tuple[int, int], indices: Sequence[int]
) -> tuple[Any, Callable[[np.ndarray], Any]]:
    """datasketch's index of the rows `indices` of `values`, and what makes a MinHash to ask it with from such a row."""
    from datasketch import MinHash, MinHashLSH

    used = bands[0] * bands[1]
    permutations = MinHash(num_perm=used).permutations

    def minhash(row: np.ndarray) -> Any:
        return MinHash(hashvalues=row[:used], permutations=permutations, scheme="affine32")

    lsh = MinHashLSH(num_perm=used, params=bands)
    for index in tqdm(indices, desc="looking for near-duplicates", unit="row", disable=None, leave=False, delay=2):
        lsh.insert(int(index), minhash(values[index]), check_duplication=False)
    return lsh, minhash


def jaccard(one: str, other: str) -> float:
    """Overlap of two texts' three-word shingles, 0 to 1."""
    if one == other:
        return 1.0
    first, second = _shingles(one), _shingles(other)
    both = len(first & second)
    return both / (len(first) + len(second) - both)


def words_of(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return _WORD.findall(text.lower())


def _near(one: Any, other: Any) -> bool:
    return jaccard(text_of(one), text_of(other)) >= NEAR


@lru_cache(maxsize=20_000)
def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = words_of(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False)) if len(words) > 2 else frozenset([tuple(words)])


def _sketch(rows: Iterable[list[list[str]]], count: int) -> Sketch:
    """`rows` are lists of fields, each a list of words; the first field is the prompt."""
    from datasketch import MinHash

    values = Sketch(*(np.empty((count, PERMUTATIONS), np.uint32) for _ in range(2)))
    factors, shifts = MinHash(num_perm=PERMUTATIONS).permutations
    rows = iter(rows)
    with tqdm(total=count, desc="hashing", unit="row", disable=None, leave=False, delay=2) as bar:
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            shingles, starts = _hash_shingles(list(islice(rows, CHUNK)))
            for number, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
                least = np.minimum.reduceat(shingles * factor + shift, starts)
                values.prompts[part, number] = least[::2]
                values.rows[part, number] = np.minimum(least[::2], least[1::2])
            bar.update(len(starts) // 2)
    return values


@lru_cache(maxsize=1_000_000)
def _hash_word(word: str) -> int:
    """The same number for a word on every machine."""
    return zlib.crc32(word.encode())


def _hash_shingles(rows: list[list[list[str]]]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all three-word shingles, row by row, and where each row's prompt and its answers begin among them."""
    words: list[int] = []
    sizes = []  # shingles of each field; one of fewer than three words is filled up and has one
    for row in rows:
        for text in row:
            words.extend(map(_hash_word, text))
            words.extend([0] * (3 - len(text)))
            sizes.append(max(1, len(text) - 2))
    numbers = np.array(words, np.uint64)
    mixed = numbers[:-2] * _MIX[0] + numbers[1:-1] * _MIX[1] + numbers[2:] * _MIX[2]
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX[3]
    shingles = (mixed >> np.uint64(32)).astype(np.uint32)
    per_row = np.array(sizes).reshape(len(rows), -1)
    ends = np.cumsum(per_row.ravel() + 2)  # in words: the two windows before an end reach into the next field
    within = np.ones(len(numbers), bool)
    within[ends - 1] = within[ends - 2] = False
    halves = np.stack([per_row[:, 0], per_row[:, 1:].sum(1)], axis=1).ravel()
    return shingles[within[: len(shingles)]], np.concatenate([[0], np.cumsum(halves)[:-1]])
