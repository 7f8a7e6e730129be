"""The policy, and another one beside it, on the held-out rows: what preferences.json holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dpo_kit.errors import ModelError
from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.evaluate.job import Job


def measure_preferences(job: Job) -> dict[str, Any]:
    """Held-out preferences of the policy (see preferences.py), and with `against=` the paired difference from another.

    Raises ConfigError, DataError, ModelError.
    """
    from dpo_kit.evaluate.preferences import compare_preferences, describe_preferences, margins_by_pair

    method = job.method
    kind, rows = job.held_out()
    if kind == "prompts":
        return {"status": "skipped", "reason": "the held-out rows are prompts without answers"}
    scores, used = _score(job, job.policy, job.reference, rows, job.beta)
    found = {
        "status": "done",
        "policy": job.policy.name,
        "reference": job.reference.name,
        "split": job.split,
        "beta": job.beta,
        **describe_preferences(scores, used, job.beta, method.saturation),
    }
    other = job.opponent
    if kind == "pairs" and isinstance(other, Candidate) and other != job.reference:
        reference = job.reference if other.tuned is None else other.start
        theirs = margins_by_pair(*_score(job, other, reference, rows, None))
        found["against"] = {"name": other.name, **compare_preferences(margins_by_pair(scores, used), theirs)}
    return found


def _score(
    job: Job, policy: Candidate, reference: Candidate, rows: list[dict[str, Any]], beta: float | None
) -> tuple[Any, list[dict[str, Any]]]:
    from dpo_kit.model.load import token_differences
    from dpo_kit.run.quiet import quiet_libraries
    from dpo_kit.trainer.held_out import Tuned, place, score_rows

    quiet_libraries()
    own_base = policy.tuned is not None and policy.model.path == reference.model.path
    if not own_base and (differing := token_differences(policy.tokenizer(), reference.tokenizer())):
        raise ModelError(
            f"{policy.name} and {reference.name} have other vocabularies ({'; '.join(differing)}), so that their "
            "log-probabilities would be those of other texts: compare answers instead, parts=[win_rate]"
        )
    tuned = Tuned(place(policy.load()), policy.tokenizer(), SimpleNamespace(**job.config["trl"]))
    return score_rows(tuned, rows, reference.load(), beta)
