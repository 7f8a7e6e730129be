"""Where the tuned model loses: losses in groups that a reader can act on, counted against the wins.

A group is one rule of two texts, and may overlap with others. What is frequent among losses says little by itself
(long answers may win as often); the rate among losses over the rate among wins does. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from dpo_kit.data.report.text_rules import is_refusal
from dpo_kit.evaluate.benchmark_options import Failures
from dpo_kit.model.chats import Prompt, conversation_text
from dpo_kit.run.files import write_jsonl, write_text
from dpo_kit.run.report.markdown import fence

Z95 = NormalDist().inv_cdf(0.975)
OTHER = "other"


@dataclass(frozen=True)
class Compared:
    """A prompt, the tuned model's answer, the other's, who won by the judge, and what the gold reward says (or None).

    `outcome` is for the tuned model: win, loss, tie, order-dependent or unjudged.
    """

    prompt: Prompt
    answer: str
    other: str
    outcome: str
    gold_answer: float | None = None
    gold_other: float | None = None

    @property
    def question(self) -> str:
        """The prompt as one text."""
        return conversation_text(self.prompt)


@dataclass(frozen=True)
class Rule:
    """A group of failures: what it means, which rows are in it, what to change next."""

    name: str
    meaning: str
    test: Callable[[Compared], bool]
    advice: str


# --- rules: pure functions of the texts --------------------------------------------------------------------------

LENGTH_RATIO, LEAST_WORDS = 1.5, 5
REPEATED, N_GRAM = 0.2, 4
MENTIONED = 0.5

_STEP = re.compile(
    r"^\s*(?:step\s+\d+|\d+[.)]\s)"
    r"|\b(?:first(?:ly)?|second(?:ly)?|then|next|therefore|thus|hence|because|so that|finally)\b"
    r"|\d\s*[-+*/×=]\s*\d",
    re.IGNORECASE | re.MULTILINE,
)
_FORM = {
    "list": re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", re.MULTILINE),
    "code": re.compile(r"^\s*(?:```|~~~)", re.MULTILINE),
    "heading": re.compile(r"^\s*#{1,6}\s+\S", re.MULTILINE),
    "table": re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE),
    "json": re.compile(r"\A\s*[\[{].*[\]}]\s*\Z", re.DOTALL),
    "bold": re.compile(r"\*\*\S[^*\n]*\*\*"),
}
_SMALL = (
    "a about an and any are as at be been but by can could did do does for from had has have he her his how i if in "
    "into is it its just me my no not of on or our please she should so some than that the their them there they this "
    "to up us was we were what when where which who why will with would write you your"
)  # fmt: skip


def words(text: str) -> list[str]:
    """The words of a text, in lower case, in any script that parts its words."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def repeated_share(text: str, size: int = N_GRAM) -> float:
    """Share of a text's runs of `size` words that stood in it before: 0 for a text that never repeats itself."""
    said = words(text)
    grams = [tuple(said[start : start + size]) for start in range(len(said) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def forms(text: str) -> set[str]:
    """Which kinds of markup a text has: list, code, heading, table, json, bold."""
    return {name for name, pattern in _FORM.items() if pattern.search(text)}


def steps(text: str) -> int:
    """How many marks of reasoning step by step a text has: numbered steps, first/then/therefore, calculations."""
    return len(_STEP.findall(text))


def mentioned_share(question: str, answer: str) -> float:
    """Share of the question's content words that the answer takes up."""
    small = _SMALL.split()
    asked = {word for word in words(question) if word not in small and len(word) > 2}
    return len(asked & set(words(answer))) / len(asked) if asked else 1.0


def _is_longer(longer: str, shorter: str) -> bool:
    more, less = len(words(longer)), len(words(shorter))
    return more >= LENGTH_RATIO * less and more - less >= LEAST_WORDS


def _repeats_more(row: Compared) -> bool:
    own = repeated_share(row.answer)
    return own >= REPEATED and own >= 2 * repeated_share(row.other)


def _drops_steps(row: Compared) -> bool:
    kept, other = steps(row.answer), steps(row.other)
    return other >= 3 and kept <= other / 3


def _misses_the_subject(row: Compared) -> bool:
    other = mentioned_share(row.question, row.other)
    return other > 0 and mentioned_share(row.question, row.answer) < MENTIONED * other


RULES = (
    Rule(
        "shorter",
        f"at least {LENGTH_RATIO:g} times shorter than the other answer",
        lambda row: _is_longer(row.other, row.answer),
        "add pairs whose chosen answer is the complete one; where the data prefer short answers, balance their "
        "lengths: python -m dpo_kit data mode=curate curate.balance_length=true",
    ),
    Rule(
        "longer",
        f"at least {LENGTH_RATIO:g} times longer than the other answer",
        lambda row: _is_longer(row.answer, row.other),
        "balance the lengths of chosen and rejected (python -m dpo_kit data mode=curate curate.balance_length=true), "
        "or take a loss that normalises by length (method=simpo, method=dpo_norm); a higher beta keeps it closer",
    ),
    Rule(
        "refusal",
        "declines where the other answers",
        lambda row: is_refusal(row.answer) and not is_refusal(row.other),
        "look for harmless prompts whose chosen answer declines, and add pairs in which the helpful answer is chosen",
    ),
    Rule(
        "repetition",
        f"at least {REPEATED:.0%} of its runs of {N_GRAM} words are repeated, twice as many as in the other",
        _repeats_more,
        "a sign of over-optimisation: a lower learning rate, fewer epochs or a higher beta, or an earlier checkpoint; "
        "see whether chosen answers repeat themselves",
    ),
    Rule(
        "format lost",
        "has none of the lists, code, headings, tables or JSON that the other has",
        lambda row: bool(forms(row.other) - {"bold"}) and not forms(row.answer) & forms(row.other),
        "add pairs in which only the format differs and the asked-for one is chosen",
    ),
    Rule(
        "reasoning dropped",
        "at most a third of the other's steps of reasoning",
        _drops_steps,
        "add chain-of-thought pairs: worked answers chosen over bare results, rated for the result and the way to it",
    ),
    Rule(
        "off-topic",
        f"takes up less than {MENTIONED:.0%} of what the other takes up of the question's words",
        _misses_the_subject,
        "add pairs for these kinds of prompts with a fluent answer to another question as the rejected one; a higher "
        "beta keeps what the reference knew",
    ),
)


# --- counts ------------------------------------------------------------------------------------------------------


def groups_of(row: Compared) -> list[str]:
    """The names of the rules that a row meets; `other` where it meets none."""
    return [rule.name for rule in RULES if rule.test(row)] or [OTHER]


def rate_ratio(losses: int, all_losses: int, wins: int, all_wins: int, z: float = Z95) -> tuple[float, float, float]:
    """(ratio, low, high) of losses/all_losses to wins/all_wins with its interval (95 % by default).

    On the log scale (Katz 1978) with ½ added to each count, so that it stands where one of them is 0 (Walter 1975).
    """
    a, n, b, m = losses + 0.5, all_losses + 0.5, wins + 0.5, all_wins + 0.5
    ratio, spread = (a / n) / (b / m), math.sqrt(max(0.0, 1 / a - 1 / n + 1 / b - 1 / m))
    return ratio, ratio * math.exp(-z * spread), ratio * math.exp(z * spread)


def analyze_failures(rows: Iterable[Compared], options: Failures, folder: Path) -> dict[str, Any]:
    """Counts of each group among losses and wins, most telling first; pages and collect.jsonl in `folder`.

    A group is `telling` where it is more frequent among losses beyond chance, all rules considered (Bonferroni).
    """
    known = list(rows)
    outcomes = Counter(row.outcome for row in known)
    named = [(row, groups_of(row)) for row in known if row.outcome in ("loss", "win")]
    groups = [_count(name, named, outcomes) for name in (*(rule.name for rule in RULES), OTHER)]
    groups.sort(key=lambda each: (not each["telling"], each["name"] == OTHER, -each["losses"]))
    collected = _collect(named, groups, options.collect)
    _write_pages(groups, named, options.examples, folder)
    write_jsonl(folder / "collect.jsonl", collected)
    return {
        "outcomes": dict(outcomes),
        "groups": groups,
        "collected": len(collected),
        "note": (
            "collect.jsonl holds prompts of this evaluation: collect pairs for further prompts of their kind, since a "
            "model trained on these very prompts could not be measured with them any more"
        ),
    }


def _write_pages(
    groups: Sequence[Mapping[str, Any]], named: Sequence[tuple[Compared, list[str]]], examples: int, folder: Path
) -> None:
    """A page for each group that has losses; those of an earlier analysis go."""
    for group in groups:
        file = folder / f"{group['name'].replace(' ', '_')}.md"
        members = [row for row, names in named if row.outcome == "loss" and group["name"] in names]
        if members:
            write_text(file, page(group, members[:examples]))
        else:
            file.unlink(missing_ok=True)


def _count(name: str, named: Sequence[tuple[Compared, list[str]]], outcomes: Mapping[str, int]) -> dict[str, Any]:
    losses, wins = (sum(row.outcome == kind and name in names for row, names in named) for kind in ("loss", "win"))
    counts = (losses, outcomes.get("loss", 0), wins, outcomes.get("win", 0))
    ratio, low, high = rate_ratio(*counts)
    strict = NormalDist().inv_cdf(1 - 0.025 / len(RULES))
    rule = next((rule for rule in RULES if rule.name == name), None)
    return {
        "name": name,
        "meaning": rule.meaning if rule else "in none of the other groups",
        "losses": losses,
        "wins": wins,
        "ratio": ratio,
        "low": low,
        "high": high,
        "telling": rule is not None and rate_ratio(*counts, z=strict)[1] > 1,
        "advice": rule.advice if rule else "read the examples: what they share is not among the rules",
    }


def _collect(
    named: Sequence[tuple[Compared, list[str]]], groups: Sequence[Mapping[str, Any]], most: int
) -> list[dict[str, Any]]:
    """Lost prompts, once each: those in the most telling groups first, then by how much gold reward was lost."""
    telling = {group["name"] for group in groups if group["telling"]}

    def urgency(found: tuple[Compared, list[str]]) -> tuple[int, float]:
        row, names = found
        known = row.gold_answer is not None and row.gold_other is not None
        return len(telling & set(names)), (row.gold_other or 0.0) - (row.gold_answer or 0.0) if known else 0.0

    lost = sorted((found for found in named if found[0].outcome == "loss"), key=urgency, reverse=True)
    once: dict[str, tuple[Compared, list[str]]] = {}
    for row, names in lost:
        once.setdefault(row.question, (row, names))
    return [
        {"prompt": row.prompt, "groups": names, "lost_with": row.answer, "lost_to": row.other}
        for row, names in list(once.values())[:most]
    ]


# --- pages -------------------------------------------------------------------------------------------------------


def page(group: Mapping[str, Any], members: Sequence[Compared]) -> str:
    """One group as Markdown: its figures, the next change, examples whose texts cannot leave their fences."""
    head = (
        f"# {group['name']}\n\n{group['meaning'][:1].upper()}{group['meaning'][1:]}: {group['losses']} of the losses, "
        f"{group['wins']} of the wins; rate among losses over rate among wins {group['ratio']:.2f} "
        f"[{group['low']:.2f}, {group['high']:.2f}].\n\n**Next:** {group['advice']}.\n"
    )
    return head + "".join(f"\n## Example {number}\n{_example(row)}" for number, row in enumerate(members, start=1))


def _example(row: Compared) -> str:
    gold = [f" (gold reward {value:.2f})" if value is not None else "" for value in (row.gold_answer, row.gold_other)]
    parts = {"Prompt": row.question, f"Lost with{gold[0]}": row.answer, f"Lost to{gold[1]}": row.other}
    return "".join(f"\n{name}:\n\n{fence(text)}\n" for name, text in parts.items())
