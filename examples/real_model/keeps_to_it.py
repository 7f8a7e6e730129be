"""A reward that a program can check and a reader finds sensible: does an answer keep to what was asked for?

Prompts ask for a numbered list of so many items, or for one sentence of at most so many words, and nothing else.
"""

import re

LISTED = """
    animals that live in the sea|birds|insects|farm animals|animals with stripes|fruits|vegetables|trees|flowers|spices
    drinks|desserts|kinds of bread|countries in Europe|capital cities|rivers|oceans|planets|deserts|tools of a carpenter
    musical instruments|pieces of furniture|kitchen utensils|vehicles|board games|toys|sports|jobs in a hospital
    school subjects|dances|hobbies|chores
"""
EXPLAINED = """
    a lighthouse|a glacier|a volcano|a library|an umbrella|a compass|a telescope|a bridge|a passport|a thermometer
    a bakery|a calendar|a map|a candle|a bicycle|an eclipse|a rainbow|a desert|a harbour|a mirror|a museum|a recipe
    a sail|a shadow|a snowflake|a spoon|a tent|a tide|a train|a well|a whistle|a windmill
"""
FACTS = """
    What is the capital of France?|Paris
    What is the capital of Italy?|Rome
    What is the capital of Japan?|Tokyo
    What is the capital of Spain?|Madrid
    Which planet do we live on?|Earth
    What is the largest ocean?|Pacific
    What colour is the sky on a clear day?|blue
    What colour is grass?|green
    What is frozen water called?|ice
    How many days are in a week?|seven|7
    How many legs does a spider have?|eight|8
    What is 2 + 3?|five|5
    Which animal barks?|dog
    What do bees make?|honey
    What is the opposite of hot?|cold
    What is the first month of the year?|January
"""
COUNTS, WORDS = (3, 4, 5, 6), (8, 12, 16, 20)
MAX_NEW_TOKENS = 24  # of an answer to one of FACTS


def split(text):
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|")]


def prompts():
    """Every prompt, as text."""
    for count in COUNTS:
        for things in split(LISTED):
            yield f"Name {count} {things}. Answer with a numbered list of exactly {count} items and nothing else."
    for words in WORDS:
        for thing in split(EXPLAINED):
            yield f"What is {thing}? Answer in one sentence of at most {words} words and nothing else."


def gold_rewards(prompts, answers):
    """Of each answer the share of what was asked for that it keeps to: 0 to 1."""
    return [reward(prompt[-1]["content"], answer) for prompt, answer in zip(prompts, answers, strict=True)]


def reward(prompt, answer):
    if count := re.search(r"exactly (\d+) items", prompt):
        return keeps_list(answer, int(count[1]))
    return keeps_sentence(answer, int(re.search(r"at most (\d+) words", prompt)[1]))


def keeps_list(answer, count):
    """A third each for as many items as asked for, for short ones, and for nothing beside them."""
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    items = [line for line in lines if re.match(r"\d+[.)] *\S", line)]
    right = 1 - min(1, abs(len(items) - count) / count)
    short = sum(len(item.split()) <= 5 for item in items) / max(1, len(items))
    return (right + short + len(items) / max(1, len(lines))) / 3


def keeps_sentence(answer, most):
    """A half for one whole sentence, a half for no more words than asked for (less by each one over)."""
    text = answer.strip()
    ends = re.findall(r"[.!?](?=\s|$)", text)
    whole = (len(ends) == 1 and text[-1] in ".!?") + 0.5 * (len(ends) != 1 and text[-1:] in {".", "!", "?"})
    over = max(0, len(text.split()) - most)
    return 0.5 * whole + 0.5 * max(0.0, 1 - over / most) if text else 0.0


def capability_prompts():
    """Questions whose answers tuning should not cost."""
    return [f"{line.strip().split('|')[0]} Answer briefly." for line in FACTS.strip().splitlines()]


def capability_score(prompts, answers):
    """The share of FACTS that are answered right."""
    known = dict(zip(capability_prompts(), FACTS.strip().splitlines(), strict=True))
    right = [
        any(re.search(rf"\b{word}\b", answer, re.I) for word in known[prompt].strip().split("|")[1:])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return sum(right) / len(right)
