"""What stands in the data nearly twice: near-duplicates, pairs that nearly contradict each other, leaks, alike prompts.

Two texts are near when their sets of three-word shingles (case, punctuation and spacing ignored) overlap by a Jaccard
index of NEAR or more; two rows are when each of their fields is. MinHash (datasketch; arXiv:2107.06499 for its use on
training text) proposes candidates, the exact index decides, so nothing is called a duplicate by chance.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dpo_kit.data.report.duplicates import beside
from dpo_kit.data.report.figures import spread, words_of
from dpo_kit.data.rows import ANSWERS, Kind, Rows
from dpo_kit.model.chats import text_of
from dpo_kit.run.quiet import bar

NEAR = 0.8  # least Jaccard index of near texts
ALIKE = 0.6  # least Jaccard index of prompts in one cluster
ROW_BANDS, PROMPT_BANDS = (10, 4), (13, 3)  # bands x rows: 99.5 % of the rows at .8 are proposed, 96 % of prompts at .6
PERMUTATIONS = 40
CROWD = 50  # members of a bucket that each further one is compared with
CHUNK = 2000
SAMPLE = 2000  # pairs whose two answers are compared with each other
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xBF58476D1CE4E5B9], np.uint64)
Hashes = tuple[np.ndarray, np.ndarray]  # MinHash values of whole rows and of their prompts, (rows, PERMUTATIONS) each


def sketch(rows: Rows, kind: Kind) -> Hashes:
    """The MinHash values of all rows, with a bar on a terminal."""
    from datasketch import MinHash

    of_rows: np.ndarray = np.empty((len(rows), PERMUTATIONS), np.uint32)
    of_prompts: np.ndarray = np.empty_like(of_rows)
    factors, shifts = MinHash(num_perm=PERMUTATIONS).permutations
    with bar(len(rows), "hashing", "row") as progress:
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            shingles, starts = _hash_shingles(rows[part], ("prompt", *ANSWERS[kind]))
            for number, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
                least = np.minimum.reduceat(shingles * factor + shift, starts)
                of_prompts[part, number] = least[::2]
                of_rows[part, number] = np.minimum(least[::2], least[1::2])
            progress.update(len(starts) // 2)
    return of_rows, of_prompts


@lru_cache(maxsize=1_000_000)
def _hash_word(word: str) -> int:
    """The same number for a word on every machine."""
    return zlib.crc32(word.encode())


def _hash_shingles(rows: Rows, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the three-word shingles of the fields `names`, row by row; where each prompt and its answers begin."""
    words: list[int] = []
    sizes = []  # shingles of each field; one of fewer than three words is filled up and has one
    for row in rows:
        for text in (words_of(text_of(row[name])) for name in names):
            words += [*map(_hash_word, text), *[0] * (3 - len(text))]
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


def find_near(
    rows: Rows, kind: Kind, values: np.ndarray, order: Sequence[int]
) -> tuple[dict[int, int], list[tuple[int, int]], int]:
    """Near-duplicates among `rows`, each with the one that it is near to, which stands before it in `order` and is no
    duplicate itself; pairs of rows that nearly contradict each other; and how many comparisons crowded buckets would
    have needed besides.
    """
    contradictions: list[tuple[int, int]] = []

    def same(index: int, other: int) -> bool:
        row, earlier = rows[index], rows[other]

        def near(mine: str, theirs: str) -> bool:
            return jaccard(text_of(row[mine]), text_of(earlier[theirs])) >= NEAR

        if not near("prompt", "prompt") or beside(row) != beside(earlier):
            return False
        straight = all(near(name, name) for name in ANSWERS[kind])
        if kind == "unary":
            crossed = straight and row["label"] != earlier["label"]
        else:
            crossed = not straight and near("chosen", "rejected") and near("rejected", "chosen")
        if crossed:
            contradictions.append((other, index))
        return straight and not crossed

    leader, left_out = cover(values, ROW_BANDS, order, same)
    return leader, contradictions, left_out


def cover(
    values: np.ndarray, bands: tuple[int, int], order: Sequence[int], same: Callable[[int, int], bool]
) -> tuple[dict[int, int], int]:
    """({index: leader}, comparisons left out): each index that is `same` as one before it in `order` with no leader."""
    place = {index: rank for rank, index in enumerate(order)}
    before: dict[int, set[int]] = defaultdict(set)
    left_out = 0
    for members in _buckets(values, bands, order):
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


def _buckets(values: np.ndarray, bands: tuple[int, int], order: Sequence[int]) -> Iterator[list[int]]:
    """The rows of `values` that are alike in all of a band, band by band, each bucket in their `order`."""
    count, width = bands
    with bar(count, "looking for near-duplicates", "band") as progress:
        for start in range(0, count * width, width):
            members: dict[bytes, list[int]] = defaultdict(list)
            for index in order:
                members[values[index, start : start + width].tobytes()].append(index)
            yield from members.values()
            progress.update()


def jaccard(one: str, other: str) -> float:
    """Overlap of two texts' three-word shingles, 0 to 1."""
    if one == other:
        return 1.0
    first, second = _shingles(one), _shingles(other)
    both = len(first & second)
    return both / (len(first) + len(second) - both)


@lru_cache(maxsize=20_000)
def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = words_of(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False)) if len(words) > 2 else frozenset([tuple(words)])


# --- prompts -----------------------------------------------------------------------------------------------------


def near_leaks(train: Rows, prompts: Sequence[str], values: np.ndarray) -> dict[int, str]:
    """{index of a row of `train`: which of `prompts` its own is near to}; `values` are those of its prompts."""
    if not prompts:
        return {}
    held, leaks = list(dict.fromkeys(prompts)), dict[int, str]()
    _, values_held = sketch([{"prompt": text, "completion": ""} for text in held], "unary")
    texts, owners = group_by_prompt(train)
    both = np.concatenate([values_held, values[[rows[0] for rows in owners]]])  # the held-out ones first
    proposed: dict[int, set[int]] = defaultdict(set)
    for members in _buckets(both, PROMPT_BANDS, range(len(both))):
        ours = [index for index in members if index < len(held)]
        for index in members[len(ours) :]:
            proposed[index - len(held)].update(ours)
    for index, near in proposed.items():
        shared = next((held[i] for i in sorted(near) if jaccard(texts[index], held[i]) >= NEAR), None)
        leaks |= dict.fromkeys(owners[index], shared) if shared is not None else {}
    return leaks


def group_by_prompt(rows: Rows) -> tuple[list[str], list[list[int]]]:
    """Each different prompt's text, and the indices of the rows that have it."""
    owners: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        owners.setdefault(text_of(row["prompt"]), []).append(index)
    return list(owners), list(owners.values())


def measure_difficulty(rows: Rows, kind: Kind) -> dict[str, Any] | None:
    """How alike the two answers are (Jaccard index of their shingles) on a fixed sample: the more, the harder to tell
    apart. What the raters and the reference find hard stands under `agreement` and `reference`.
    """
    if kind != "pairs":
        return None
    sample = sorted(rows, key=lambda row: row["prompt_id"])[:SAMPLE]
    overlaps = [jaccard(text_of(row["chosen"]), text_of(row["rejected"])) for row in sample]
    return {
        "sampled": len(sample),
        "answers_overlap": spread(overlaps),
        "nearly_alike": sum(overlap >= NEAR for overlap in overlaps) / len(overlaps),
    }


def measure_diversity(rows: Rows, values: np.ndarray) -> dict[str, Any]:
    """Distinct prompts, rows for each, clusters of alike ones; `values` are MinHash values of the rows' prompts."""
    texts, owners = group_by_prompt(rows)
    clusters: Counter[int] = Counter()
    of_texts = values[[same[0] for same in owners]]
    leader, _ = cover(of_texts, PROMPT_BANDS, range(len(texts)), lambda i, j: jaccard(texts[i], texts[j]) >= ALIKE)
    for index, indices in enumerate(owners):
        clusters[leader.get(index, index)] += len(indices)
    largest = clusters.most_common(5)
    return {
        "prompts": len(texts),
        "rows_of_the_most_used_prompt": max(map(len, owners)),
        "clusters": len(clusters),
        "largest_cluster": largest[0][1] / len(rows),
        "largest": [[texts[first][:80], count] for first, count in largest if count > 1],
        "opening_words": len({" ".join(text_of(text).lower().split()[:3]) for text in texts}),
    }
