"""A reward in which no two texts tie, for the tests of online methods: `judge.module=tests.scored_by_text`."""

import hashlib


def gold_rewards(prompts, answers):
    """A number in [0, 1) for each answer, the same wherever it stands."""
    return [int(hashlib.sha256(answer.encode()).hexdigest()[:12], 16) / 16**12 for answer in answers]
