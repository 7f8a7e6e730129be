"""A truth that a program can check and a reader finds sensible: does the answer keep to what was asked for?

Each prompt is a request and a rule (`RULES`): one sentence, two of them, so many words. The gold reward of an answer is
how far it keeps to the rule (0 to 1), and half a point more if it speaks of what was asked about.
Beside it stands what tuning should not cost: capitals of the world (`capability_score`).

A module like this one is what `data.gold=…` and `judge.module=…` name.
"""

import random
import re
from functools import partial

MAX_NEW_TOKENS = 48
TOPICS = re.findall(
    r"\w+",
    """bread cheese coffee tea honey rice sugar salt chocolate butter apples oranges tomatoes potatoes mushrooms
rain snow wind clouds thunder rainbows volcanoes earthquakes glaciers deserts rivers oceans islands mountains forests
bees ants spiders whales sharks penguins owls horses dogs cats elephants frogs snakes butterflies bicycles trains ships
airplanes bridges clocks mirrors candles pencils paper books maps music chess football swimming painting gardening
sleep dreams laughter memory friendship honesty money banks markets schools hospitals museums castles pyramids robots
computers batteries magnets telescopes satellites stars comets planets""",
)
REQUESTS = ("Tell me about {}.", "Why do people like {}?", "What should a child know about {}?")


def sentences(text):
    return [piece for piece in re.split(r"(?<=[.!?])\s+", text.strip()) if piece]


def in_sentences(text, wanted):
    """1 for so many whole sentences, less the further from it; 0 where the answer breaks off."""
    return 1 / (1 + abs(len(sentences(text)) - wanted)) if text.strip().endswith((".", "!", "?")) else 0.0


def at_most_fifteen_words(text):
    return min(1.0, 15 / len(text.split())) if text.split() else 0.0


RULES = {
    "Answer in one sentence.": partial(in_sentences, wanted=1),
    "Answer in two sentences.": partial(in_sentences, wanted=2),
    "Use at most fifteen words.": at_most_fifteen_words,
}
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo", "Ireland": "Dublin", "Cuba": "Havana",
}  # fmt: skip


def make_prompts(seed=0):
    """Every topic under every rule, the request drawn: {"prompt": text} each, in an order of `seed`."""
    draw = random.Random(seed)
    asked = [f"{draw.choice(REQUESTS).format(topic)} {rule}" for topic in TOPICS for rule in RULES]
    draw.shuffle(asked)
    return [{"prompt": text} for text in asked]


def gold_rewards(prompts, answers):
    """The reward of each answer, 0 to 1.5. A prompt is its text, or chat messages of which the last user's counts."""
    return [reward(text_of(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]


def reward(prompt, answer):
    keeps = next(check for rule, check in RULES.items() if prompt.endswith(rule))
    topic = next(topic for topic in TOPICS if re.search(rf"\b{topic}\b", prompt))
    return keeps(answer) + 0.5 * (topic.rstrip("s")[:5] in answer.lower())


def text_of(prompt):
    return prompt if isinstance(prompt, str) else [turn["content"] for turn in prompt if turn["role"] == "user"][-1]


def capability_prompts():
    return [f"What is the capital of {country}?" for country in CAPITALS]


def capability_score(prompts, answers):
    """The share of answers that name the capital."""
    right = [
        CAPITALS[re.search(r"of (\w+)\?", text_of(prompt))[1]] in answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return sum(right) / len(right)
