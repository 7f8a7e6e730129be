"""Where the tuned model loses: losses in groups that a reader can act on, counted against the wins.

A group is one rule of two texts, and may overlap with others. What is frequent among losses says little by itself
(long answers may win as often); the rate among losses over the rate among wins does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from dpo_kit.data.report.text_rules import is_refusal
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, Part, line
from dpo_kit.model.chats import Prompt, conversation_text
from dpo_kit.run.files import write_jsonl, write_text
from dpo_kit.run.history import read_metrics
from dpo_kit.run.intervals import Z95
from dpo_kit.run.report.markdown import fence

EXAMPLES = 5  # on the page of each group
COLLECTED = 200  # prompts in collect.jsonl at most


@dataclass(frozen=True)
class Contest:
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


def is_longer(longer: str, shorter: str) -> bool:
    """Whether a text has so many more words that a reader sees it."""
    more, less = len(words(longer)), len(words(shorter))
    return more >= LENGTH_RATIO * less and more - less >= LEAST_WORDS


RULES: dict[str, Callable[[Contest], bool]] = {  # what is in a group; its meaning and advice are in failures.yaml
    "shorter": lambda row: is_longer(row.other, row.answer),
    "longer": lambda row: is_longer(row.answer, row.other),
    "refusal": lambda row: is_refusal(row.answer) and not is_refusal(row.other),
    "repetition": lambda row: repeated_share(row.answer) >= max(REPEATED, 2 * repeated_share(row.other)),
    "format lost": lambda row: bool(forms(row.other) - {"bold"}) and not forms(row.answer) & forms(row.other),
    "reasoning dropped": lambda row: steps(row.other) >= max(3, 3 * steps(row.answer)),
    "off-topic": lambda row: (
        mentioned_share(row.question, row.answer) < MENTIONED * mentioned_share(row.question, row.other)
    ),
}
REST = "other"  # the losses that no rule tells


# --- counts ------------------------------------------------------------------------------------------------------


def groups_of(row: Contest) -> list[str]:
    """The names of the rules that a row meets; `other` where it meets none."""
    return [name for name, test in RULES.items() if test(row)] or [REST]


def rate_ratio(losses: int, all_losses: int, wins: int, all_wins: int, z: float = Z95) -> tuple[float, float, float]:
    """(ratio, low, high) of losses/all_losses to wins/all_wins with its interval (95 % by default).

    On the log scale (Katz 1978) with ½ added to each count, so that it stands where one of them is 0 (Walter 1975).
    """
    a, n, b, m = losses + 0.5, all_losses + 0.5, wins + 0.5, all_wins + 0.5
    ratio, spread = (a / n) / (b / m), math.sqrt(max(0.0, 1 / a - 1 / n + 1 / b - 1 / m))
    return ratio, ratio * math.exp(-z * spread), ratio * math.exp(z * spread)


def analyze_failures(rows: Iterable[Contest], folder: Path) -> dict[str, Any]:
    """Counts of each group among losses and wins, most telling first; pages and collect.jsonl in `folder`.

    A group is `telling` where it is more frequent among losses beyond chance, all rules considered (Bonferroni).
    """
    known = list(rows)
    outcomes = Counter(row.outcome for row in known)
    losses, wins = ([(row, groups_of(row)) for row in known if row.outcome == kind] for kind in ("loss", "win"))
    strict = NormalDist().inv_cdf(1 - 0.025 / len(RULES))
    groups: list[dict[str, Any]] = []
    texts = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    limits = {"length_ratio": LENGTH_RATIO, "repeated": REPEATED, "n_gram": N_GRAM, "mentioned": MENTIONED}
    for name in (*RULES, REST):
        lost, won = (sum(name in names for _, names in of_kind) for of_kind in (losses, wins))
        counts = (lost, len(losses), won, len(wins))
        ratio, low, high = rate_ratio(*counts)
        meaning = texts[name]["meaning"].format(**limits)
        telling = name != REST and rate_ratio(*counts, z=strict)[1] > 1
        groups.append(
            {"name": name, "meaning": meaning, "losses": lost, "wins": won, "ratio": ratio, "low": low,
             "high": high, "telling": telling, "advice": texts[name]["advice"]}
        )  # fmt: skip
    groups.sort(key=lambda group: (not group["telling"], group["name"] == REST, -group["losses"]))
    for group in groups:
        file = folder / f"{group['name'].replace(' ', '_')}.md"
        if members := [row for row, names in losses if group["name"] in names]:
            write_text(file, page(group, members[:EXAMPLES]))
        else:  # the page of an earlier analysis goes
            file.unlink(missing_ok=True)
    tells = {group["name"] for group in groups if group["telling"]}

    def urgency(loss: tuple[Contest, list[str]]) -> tuple[int, float]:
        """In the most telling groups first, then by how much gold reward was lost."""
        row, names = loss
        known = row.gold_answer is not None and row.gold_other is not None
        return len(tells & set(names)), (row.gold_other or 0.0) - (row.gold_answer or 0.0) if known else 0.0

    once: dict[str, dict[str, Any]] = {}  # lost prompts
    for row, names in sorted(losses, key=urgency, reverse=True):
        lost_prompt = {"prompt": row.prompt, "groups": names, "lost_with": row.answer, "lost_to": row.other}
        once.setdefault(row.question, lost_prompt)
    collected = list(once.values())[:COLLECTED]
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


def page(group: Mapping[str, Any], members: Sequence[Contest]) -> str:
    """One group as Markdown: its figures, the next change, examples whose texts cannot leave their fences."""
    parts = [
        f"# {group['name']}\n\n{group['meaning'][:1].upper()}{group['meaning'][1:]}: {group['losses']} of the losses, "
        f"{group['wins']} of the wins; rate among losses over rate among wins {group['ratio']:.2f} "
        f"[{group['low']:.2f}, {group['high']:.2f}].\n\n**Next:** {group['advice']}.\n"
    ]
    for number, row in enumerate(members, start=1):
        with_gold, to_gold = (
            "" if value is None else f" (gold reward {value:.2f})" for value in (row.gold_answer, row.gold_other)
        )
        parts.append(f"\n## Example {number}\n")
        texts = {"Prompt": row.question, f"Lost with{with_gold}": row.answer, f"Lost to{to_gold}": row.other}
        parts += [f"\n{name}:\n\n{fence(text)}\n" for name, text in texts.items()]
    return "".join(parts)


# --- the part of an evaluation ---------------------------------------------------------------------------------


def read_verdicts(job: Job) -> list[Contest]:
    """The comparisons of verdicts.jsonl in which both sides answered, with gold rewards where those are known."""
    rows = read_metrics(job.folder / "verdicts.jsonl")
    whole = [row for row in rows if row["policy"] is not None and row["opponent"] is not None]
    scores: list[list[float | None]] = [[None] * len(whole)] * 2
    if (path := job.config["data"]["gold"]) and whole:
        from dpo_kit.callbacks.gold import load_gold

        gold, prompts = load_gold(path), [row["prompt"] for row in whole]
        scores = [gold.gold_rewards(prompts, [row[side] for row in whole]) for side in ("policy", "opponent")]
    return [
        Contest(row["prompt"], row["policy"], row["opponent"], row["outcome"], *pair)
        for row, *pair in zip(whole, *scores, strict=True)
    ]


class Failures(Part):
    """Where the policy loses, and what to do about it."""

    def measure(self, job: Job) -> Found:
        rows = read_verdicts(job)
        if not rows:
            return {"status": "skipped", "reason": "no verdicts to read: they are those of the part win_rate"}
        folder = job.folder / "failures"
        return {"status": "done", **analyze_failures(rows, folder), "folder": str(folder)}

    def headline(self, found: Found) -> Found:
        losses = {group["name"]: group["losses"] for group in found["groups"] if group["losses"]}
        return {
            "failures": losses,
            "failures_telling": [group["name"] for group in found["groups"] if group["telling"]],
        }

    def lines(self, found: Found) -> Iterator[Line]:
        yield "losses; a group's rate over that among wins", f"{found['outcomes'].get('loss', 0):,}", ""
        for group in found["groups"]:
            if group["losses"]:
                label = f"… {group['name']}: {group['losses']:,} of the losses, {group['wins']:,} of the wins"
                yield line(label, group["ratio"], group["low"], group["high"], ".2f")

    def notes(self, found: Found) -> Iterator[str]:
        for group in found["groups"]:
            if group["telling"]:
                yield f"It loses with answers of the group “{group['name']}” ({group['meaning']}): {group['advice']}."
        if found["collected"]:
            yield f"Pages of examples, and prompts whose kind is worth collecting pairs for: {found['folder']}"
