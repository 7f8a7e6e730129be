"""Pairs from a file of raters' votes: majority labels, and how far the raters agree.

A row is `prompt`, `answer_a`, `answer_b` and either `votes` (a list, or {rater: vote}) or `rater` and `vote` (one row a
vote). A vote is a, b or tie; null is none.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.config.settings import Data
from dpo_kit.data.read import Row, read_whole
from dpo_kit.errors import DataError, did_you_mean
from dpo_kit.judge.review import CODES, Vote, majority, rater_agreement
from dpo_kit.model.chats import answer_text
from dpo_kit.run.journal import key_of

OUTCOMES = ("pair", "tie", "identical", "not voted")


@dataclass
class Rated:
    """Two answers to a prompt and the votes on them by rater; which answer is a has nothing to do with who wins."""

    prompt: Any
    answer_a: Any
    answer_b: Any
    votes: dict[str, Vote] = field(default_factory=dict)


def pair_by_votes(path: str, data: Data) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Pairs that raters agree on, with `agreement` (share of votes) and `votes` (count), and a report. DataError."""
    items = read_votes(path, data)
    outcomes: Counter[str] = Counter()
    pairs = []
    for item in items:
        outcome, share = majority(list(item.votes.values())) if item.votes else ("not voted", 0.0)
        if answer_text(item.answer_a) == answer_text(item.answer_b):
            outcome = "identical"
        if outcome in ("a", "b"):
            chosen, rejected = (item.answer_a, item.answer_b) if outcome == "a" else (item.answer_b, item.answer_a)
            pair = {"prompt": item.prompt, "chosen": chosen, "rejected": rejected}
            pairs.append(pair | {"agreement": share, "votes": len(item.votes)})
            outcome = "pair"
        outcomes[outcome] += 1
    report = {
        "items": {"in": len(items), **{name: outcomes[name] for name in OUTCOMES}},
        "agreement": rater_agreement([item.votes for item in items]),
    }
    return pairs, report


def read_votes(path: str, data: Data) -> list[Rated]:
    """Every two answers in the file at `path` with all votes on them, in the order of the file."""
    items: dict[str, Rated] = {}
    for row in read_whole("build.votes", path, data.train_split):
        values = row.values | {ours: row.values.get(theirs) for ours, theirs in data.columns.items()}
        read = _item(row, values)
        known = items.setdefault(key_of(read.prompt, read.answer_a, read.answer_b), read)
        if known is not read:
            if twice := sorted(set(known.votes) & set(read.votes)):
                amiss = f"rater {twice[0]!r} votes a second time on the same two answers: keep one of the votes"
                raise DataError(f"{row.place}: {amiss}")
            known.votes |= read.votes
    return list(items.values())


def _item(row: Row, values: dict[str, Any]) -> Rated:
    for name in ("prompt", "answer_a", "answer_b"):
        value = values.get(name)
        if not (isinstance(value, str) and value.strip()) and not (isinstance(value, list) and value):
            amiss = f"{name} must be text or chat messages, got {value!r:.60}"
            raise DataError(f"{row.place}: {amiss}; columns: {', '.join(values)} (map others with data.columns)")
    given = values.get("votes")
    if isinstance(given, list):
        given = {f"rater {number}": vote for number, vote in enumerate(given, start=1)}
    if not isinstance(given, dict):
        if "vote" not in values or values.get("rater") is None:
            needed = "votes (a list, or an object of raters) or rater and vote"
            raise DataError(f"{row.place}: needs {needed}; columns: {', '.join(values)}")
        given = {values["rater"]: values["vote"] or None}
    a, b = values["answer_a"], values["answer_b"]
    turned: dict[str, Vote] = {}
    if key_of(b) < key_of(a):  # files may always have the better one in the same column
        a, b, turned = b, a, {"a": "b", "b": "a"}
    votes: dict[str, Vote] = {}
    for rater, vote in given.items():
        word = str(vote).strip().lower()
        if vote is not None and word not in CODES:
            raise DataError(f"{row.place}: a vote is a, b or tie, got {vote!r}{did_you_mean(word, CODES)}")
        if vote is not None:
            votes[str(rater)] = turned.get(word, word)  # type: ignore[arg-type]
    return Rated(values["prompt"], a, b, votes)
