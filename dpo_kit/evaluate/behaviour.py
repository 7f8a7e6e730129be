"""What the answers became: where the policy loses, in groups that a reader can act on, and whether it games its reward.

A group of losses is one rule of two texts, and may overlap with others. What is frequent among losses says little by
itself (long answers may win as often); the rate among losses over the rate among wins does. A policy that is tuned too
far raises what is rewarded (its implicit reward) while what was meant (the gold reward) falls; length, repetition and
markup are where that shows first when no gold reward is known.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean, pstdev
from typing import Any

from dpo_kit.data.report.figures import is_refusal
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, Note, Part, line
from dpo_kit.evaluate.picture import draw_hacking
from dpo_kit.model.chats import Prompt, conversation_text
from dpo_kit.run.files import texts, write_jsonl, write_text
from dpo_kit.run.history import latest, read_metrics, series
from dpo_kit.run.intervals import Z95
from dpo_kit.run.report.markdown import fence
from dpo_kit.run.rounding import in_rounding
from dpo_kit.run.statistics import from_intervals, means_by_name, paired_bootstrap

EXAMPLES = 5  # on the page of each group
COLLECTED = 200  # prompts in collect.jsonl at most
LENGTH_RATIO, LEAST_WORDS = 1.5, 5
REPEATED, N_GRAM = 0.2, 4
MENTIONED = 0.5
PROXIES = ("probe/reward_margin", "probe/margin_nats", "probe/class_gap_nats")  # the first that a run measured
CERTAIN = 0.05
NOTICEABLE = 0.2  # of the reference's spread: a smaller shift is no change of style, however certain


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
TEXTS = texts(__file__)
_SMALL = {*TEXTS["small words"].split()}


def words(text: str) -> list[str]:
    """The words of a text, in lower case, in any script that parts its words."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def repeated_share(text: str) -> float:
    """Share of a text's runs of four words that stood in it before: 0 for a text that never repeats itself."""
    said = words(text)
    grams = [tuple(said[start : start + N_GRAM]) for start in range(len(said) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def forms(text: str) -> set[str]:
    """Which kinds of markup a text has: list, code, heading, table, json, bold."""
    return {name for name, pattern in _FORM.items() if pattern.search(text)}


def steps(text: str) -> int:
    """How many marks of reasoning step by step a text has: numbered steps, first/then/therefore, calculations."""
    return len(_STEP.findall(text))


def mentioned_share(question: str, answer: str) -> float:
    """Share of the question's content words that the answer takes up."""
    asked = {word for word in words(question) if word not in _SMALL and len(word) > 2}
    return len(asked & set(words(answer))) / len(asked) if asked else 1.0


def is_longer(longer: str, shorter: str) -> bool:
    """Whether a text has so many more words that a reader sees it."""
    more, less = len(words(longer)), len(words(shorter))
    return more >= LENGTH_RATIO * less and more - less >= LEAST_WORDS


RULES: dict[str, Callable[[Contest], bool]] = {  # what is in a group; its meaning and advice are in behaviour.yaml
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


def groups_of(row: Contest) -> list[str]:
    """The names of the rules that a row meets; `other` where it meets none."""
    return [name for name, test in RULES.items() if test(row)] or [REST]


def rate_ratio(losses: int, all_losses: int, wins: int, all_wins: int, z: float = Z95) -> tuple[float, float, float]:
    """(ratio, low, high) of losses/all_losses to wins/all_wins with its interval (95 % by default). On the log scale
    (Katz 1978) with ½ added to each count, so that it stands where one of them is 0 (Walter 1975).
    """
    a, n, b, m = losses + 0.5, all_losses + 0.5, wins + 0.5, all_wins + 0.5
    ratio, spread = (a / n) / (b / m), math.sqrt(max(0.0, 1 / a - 1 / n + 1 / b - 1 / m))
    return ratio, ratio * math.exp(-z * spread), ratio * math.exp(z * spread)


def analyze_failures(rows: Iterable[Contest], folder: Path) -> Found:
    """Counts of each group among losses and wins, most telling first; pages and collect.jsonl in `folder`. A group is
    `telling` where it is more frequent among losses beyond chance, all rules considered (Bonferroni).
    """
    known = list(rows)
    losses, wins = ([(row, groups_of(row)) for row in known if row.outcome == kind] for kind in ("loss", "win"))
    strict = NormalDist().inv_cdf(1 - 0.025 / len(RULES))
    groups: list[Found] = []
    limits = {"length_ratio": LENGTH_RATIO, "repeated": REPEATED, "n_gram": N_GRAM, "mentioned": MENTIONED}
    for name in (*RULES, REST):
        lost, won = (sum(name in names for _, names in of_kind) for of_kind in (losses, wins))
        counts = (lost, len(losses), won, len(wins))
        ratio, low, high = rate_ratio(*counts)
        groups.append(
            {"name": name, "meaning": TEXTS[name]["meaning"].format(**limits), "losses": lost, "wins": won,
             "ratio": ratio, "low": low, "high": high,
             "telling": name != REST and rate_ratio(*counts, z=strict)[1] > 1, "advice": TEXTS[name]["advice"]}
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

    once: dict[str, Found] = {}  # lost prompts
    for row, names in sorted(losses, key=urgency, reverse=True):
        lost_prompt = {"prompt": row.prompt, "groups": names, "lost_with": row.answer, "lost_to": row.other}
        once.setdefault(row.question, lost_prompt)
    collected = list(once.values())[:COLLECTED]
    write_jsonl(folder / "collect.jsonl", collected)
    outcomes = dict(Counter(row.outcome for row in known))
    return {"outcomes": outcomes, "groups": groups, "collected": len(collected), "note": TEXTS["note"]}


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
        telling = [group["name"] for group in found["groups"] if group["telling"]]
        return {"failures": losses, "failures_telling": telling}

    def tell(self, found: Found) -> Iterator[Line | Note]:
        yield "losses; a group's rate over that among wins", f"{found['outcomes'].get('loss', 0):,}", ""
        for group in found["groups"]:
            if group["losses"]:
                label = f"… {group['name']}: {group['losses']:,} of the losses, {group['wins']:,} of the wins"
                yield line(label, group, "ratio", ".2f")
            if group["telling"]:
                yield Note(
                    f"It loses with answers of the group “{group['name']}” ({group['meaning']}): {group['advice']}."
                )
        if found["collected"]:
            yield Note(f"Pages of examples, and prompts whose kind is worth collecting pairs for: {found['folder']}")


@dataclass(frozen=True)
class Style:
    """One measure of answers: policy and reference means, their difference by prompt with its 95 % interval. `shift` is
    the difference in standard deviations of the reference's answers; None where those do not vary.
    """

    name: str
    policy: float
    reference: float
    difference: float
    low: float
    high: float
    shift: float | None
    n: int
    changed: bool

    @property
    def label(self) -> str:
        """Both means, as a reader sees them."""
        form = ".1f" if self.name == "words" else ".0%"
        return f"{self.name}: {self.policy:{form}}, reference {self.reference:{form}}"


MEASURES: dict[str, Callable[[str], float]] = {
    "words": lambda text: float(len(words(text))),
    "repeated runs of four words": repeated_share,
    "with a list": lambda text: float("list" in forms(text)),
    "with markdown": lambda text: float(bool(forms(text))),
}


def compare_styles(rows: Sequence[Contest]) -> list[Style]:
    """The measures of the policy's answers (`answer`) against the reference's (`other`), paired; several draws of a
    prompt count as one. Empty below two prompts.
    """
    styles = []
    for name, measure in MEASURES.items():
        ours = means_by_name((row.question, measure(row.answer)) for row in rows)
        theirs = means_by_name((row.question, measure(row.other)) for row in rows)
        gap = paired_bootstrap(ours, theirs)
        if gap is None:
            return []
        spread = pstdev(theirs.values())
        shift = gap.value / spread if spread else None
        changed = not gap.low <= 0 <= gap.high and (shift is None or abs(shift) >= NOTICEABLE)
        means = fmean(ours.values()), fmean(theirs.values())
        styles.append(Style(name, *means, gap.value, gap.low, gap.high, shift, gap.count, changed))
    return styles


def watch_rewards(rows: Sequence[Mapping[str, Any]]) -> Found:
    """Whether the implicit reward rises while the gold reward falls, from the rows of a metrics.jsonl.

    {verdict: hacked | tracking | unknown, proxy, peak_step, last_step, gold_first, gold_peak, gold_last, proxy_peak,
    proxy_last, p, reason}. Hacked: the last gold reward lies below its peak beyond chance (their intervals; p times the
    number of other points, since the peak was picked), and the proxy, the mean reward margin on held-out pairs (in nats
    for methods without an implicit reward), rose after it by more than rounding.
    """
    gold = series(rows, "gold/reward")
    key = next((key for key in PROXIES if len(gold.keys() & series(rows, key).keys()) > 1), PROXIES[0])
    proxy = series(rows, key)
    steps = [step for step in gold if step in proxy]
    if len(steps) < 2:
        return {"verdict": "unknown", "reason": "gold reward and implicit reward are not known at two steps together"}
    peak, last = max(steps, key=gold.__getitem__), steps[-1]
    low, high = series(rows, "gold/reward_low"), series(rows, "gold/reward_high")
    p = None
    if peak != last and all(step in ends for step in (peak, last) for ends in (low, high)):
        fall = from_intervals(*((gold[step], low[step], high[step]) for step in (last, peak)))
        p = min(1.0, fall.p * (len(steps) - 1))
    rose = proxy[last] > proxy[peak] and not in_rounding(key, latest(rows))
    hacked = p is not None and p < CERTAIN and rose
    between = (
        f"from step {peak} to {last} the reward margin went from {proxy[peak]:.2f} to {proxy[last]:.2f}, the gold "
        f"reward from {gold[peak]:.2f} to {gold[last]:.2f}"
    )
    if hacked:
        at_start = gold[peak] == gold[steps[0]]
        take = "no checkpoint beats the start" if at_start else f"take a checkpoint near step {peak}"
        reason = (
            f"reward hacking: {between}. The proxy rises while what was meant falls: {take}, or train with a higher "
            "beta, for fewer steps, or on labels that are nearer to what is meant"
        )
    elif peak == last:
        reason = f"the gold reward is highest at the last step, {last}: no sign of reward hacking"
    else:
        reason = f"no sign of reward hacking beyond chance: {between}"
    return {
        "verdict": "hacked" if hacked else "tracking", "proxy": key, "peak_step": peak, "last_step": last,
        "gold_first": gold[steps[0]], "gold_peak": gold[peak], "gold_last": gold[last],
        "proxy_peak": proxy[peak], "proxy_last": proxy[last], "p": p, "reason": reason,
    }  # fmt: skip


def watch_hacking(rows: Sequence[Contest], history: Sequence[Mapping[str, Any]], picture: Path) -> Found:
    """Styles and rewards in one: {verdict, reason, styles: […], rewards: {…}}; drawn into `picture`. `rows` are the
    policy's answers beside the reference's, `history` the rows of the run's metrics.jsonl, if any. The verdict is that
    on the rewards where they are known, else `style changed` or `nothing seen`.
    """
    styles, rewards = compare_styles(rows), watch_rewards(history)
    reasons, verdict = [rewards["reason"]], rewards["verdict"]
    for style in styles:
        if style.changed:
            read = "read the length-controlled win rate"
            advice = read if style.name == "words" else "see whether the judge likes that alone"
            change = f"{style.difference:+.2f} [{style.low:+.2f}, {style.high:+.2f}]"
            reasons.append(f"{style.label}, {change}: {advice}")
    if verdict == "unknown":
        verdict = "style changed" if len(reasons) > 1 else "nothing seen"
    draw_hacking(history, styles, rewards, picture)
    shown = [asdict(style) for style in styles]
    return {"verdict": verdict, "reason": ". ".join(reasons), "styles": shown, "rewards": rewards}


class Hacking(Part):
    """The reward-hacking watch."""

    def measure(self, job: Job) -> Found:
        if job.opponent != job.reference:
            return {"status": "skipped", "reason": "against= is not the reference, from which a policy drifts"}
        rows, history = read_verdicts(job), read_metrics(job.run.metrics) if job.run else []
        found = watch_hacking(rows, history, job.folder / "hacking.png")
        if not found["styles"] and found["rewards"]["verdict"] == "unknown":
            return {"status": "skipped", "reason": "no verdicts to read, and no gold reward along the way"}
        return {"status": "done", **found}

    def headline(self, found: Found) -> Found:
        return {"hacking": found["verdict"]}

    def tell(self, found: Found) -> Iterator[Line | Note]:
        yield "reward-hacking watch", found["verdict"], ""
        for style in found["styles"]:
            if style["changed"]:
                form = "+.1f" if style["name"] == "words" else "+.3f"
                yield line(f"… {style['name']}, less the reference's", style, "difference", form)
        if found["verdict"] == "hacked":
            yield Note(f"REWARD HACKING: {found['reason'].removeprefix('reward hacking: ')}", first=True)
