"""Who writes and who labels in the embedded lab: average replies, and raters of two of them.

Five simulated raters see only the two replies' rewards through Bradley-Terry; biased raters add a love of length, which
makes filler pay: a proxy that can be hacked. Every random draw takes the caller's `random.Random`.
"""

import math
import random
from collections.abc import Sequence

from dpo_kit.toy.domain import (
    BYE,
    CARE,
    CLOSE,
    FILLER,
    FIX_OF,
    FIXES,
    ITEMS,
    PLAIN,
    RUDE,
    Prompt,
    gold_reward,
    request_of,
)

OPENINGS = ("My {item} {problem}.", "Hello, my {item} {problem}.", "Help, my {item} {problem}!",
            "Since today my {item} {problem}.", "Why is it that my {item} {problem}?")  # fmt: skip

RATERS = 5
SHARPNESS = 1.2
"""Log-odds of one rater's vote per point of reward between the two answers."""
LENGTH_LOVE = 1.0
"""Points that a biased rater adds per word."""


def rater_score(prompt: Prompt, answer: str, *, length_love: float = 0.0) -> float:
    """What a rater feels about a reply, in points: the gold reward plus `length_love` per word."""
    return gold_reward(prompt, answer) + length_love * len(answer.split())


def vote_probability(score_a: float, score_b: float) -> float:
    """Bradley-Terry: the chance that one rater prefers a, sigmoid(SHARPNESS * (score_a - score_b))."""
    return 1.0 / (1.0 + math.exp(-SHARPNESS * (score_a - score_b)))


def votes_for_first(score_a: float, score_b: float, rng: random.Random) -> int:
    """How many of the five raters prefer a (0 to 5); draws five numbers from `rng`."""
    probability = vote_probability(score_a, score_b)
    return sum(rng.random() < probability for _ in range(RATERS))


def label_pair(
    prompt: Prompt, first: str, second: str, rng: random.Random, *, length_love: float = 0.0
) -> dict[str, object]:
    """The majority's verdict on two replies: the texts `chosen` and `rejected`, `agreement` (share of votes for
    chosen: .6, .8 or 1), and what the raters feel about each, `score_chosen` and `score_rejected` (points; the gold
    reward when `length_love` is 0).
    """
    scores = [rater_score(prompt, answer, length_love=length_love) for answer in (first, second)]
    votes = votes_for_first(scores[0], scores[1], rng)
    order = (0, 1) if 2 * votes > RATERS else (1, 0)
    answers = (first, second)
    return {
        "chosen": answers[order[0]],
        "rejected": answers[order[1]],
        "agreement": max(votes, RATERS - votes) / RATERS,
        "score_chosen": round(scores[order[0]], 4),
        "score_rejected": round(scores[order[1]], 4),
    }


def requests() -> list[str]:
    """All 2,880 requests (opening x item x problem) in a fixed order."""
    return [opening.format(item=item, problem=problem) for opening in OPENINGS for item in ITEMS for problem in FIX_OF]


def split_requests(held_out: int = 480, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """(train, held-out) prompts, disjoint, each in a seeded order."""
    order = requests()
    random.Random(seed).shuffle(order)
    return order[held_out:], order[:held_out]


def draw_reply(prompt: Prompt, rng: random.Random) -> str:
    """One reply of the average desk, from which the tiny model learns: an opening (care, plain or rude), advice that is
    right in half of the replies, often some filler, and an ending that offers more help or does not.
    """
    item, problem = request_of(prompt)
    said = [
        rng.choice(rng.choices((CARE, PLAIN, RUDE), (0.35, 0.35, 0.3))[0]) for _ in range(1 + _draw(rng, (0.92, 0.08)))
    ]
    said += [FIX_OF[problem] if rng.random() < 0.45 else rng.choice(FIXES) for _ in range(1 + _draw(rng, (0.92, 0.08)))]
    said += [rng.choice(FILLER) for _ in range(_draw(rng, (0.4, 0.35, 0.17, 0.08)))]
    said += [rng.choice(rng.choices((CLOSE, BYE), (0.45, 0.55))[0])]
    return " ".join(said).format(item=item)


def _draw(rng: random.Random, weights: Sequence[float]) -> int:
    return rng.choices(range(len(weights)), weights)[0]
