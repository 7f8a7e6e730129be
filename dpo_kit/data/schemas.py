"""Rows of common public schemas as what they say: a pair, several scored answers, or one rated answer.

The names follow the data sets: Anthropic/hh-rlhf (two transcripts), openbmb/UltraFeedback (completions with ratings),
and chosen and rejected as whole chats (HuggingFaceH4/ultrafeedback_binarized and many others).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpo_kit.data.figures import number
from dpo_kit.data.rows import is_blank

Messages = list[dict[str, Any]]
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
ANSWERS = ("answers", "responses", "completions", "candidates")
ONE_ANSWER = ("completion", "response", "answer", "output")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
SCORES, RANKS, ONE_SCORE = ("scores", "ratings"), ("ranks", "ranking", "rank"), ("score", "rating")


class UnfitError(Exception):
    """A row that does not have its schema: reason, what was found, what to do."""


@dataclass
class Judged:
    """A prompt with answers and what each is worth (higher is better). A pair has two; `rest` are the other columns."""

    prompt: Any
    answers: list[Any]
    scores: list[float]
    rest: dict[str, Any] = field(default_factory=dict)
    is_pair: bool = False  # the first was chosen over the second, whatever the scores


def _pair(values: dict[str, Any]) -> Judged:
    missing = next((name for name in ("prompt", "chosen", "rejected") if values.get(name) is None), None)
    if missing is not None:
        raise UnfitError(f"column {missing!r} is missing or null", _names(values), "take the schema that the rows have")
    rest = _without(values, "prompt", "chosen", "rejected")
    return Judged(values["prompt"], [values["chosen"], values["rejected"]], [1.0, 0.0], rest, is_pair=True)


def _unary(values: dict[str, Any]) -> Judged:
    if not isinstance(values.get("label"), bool):
        raise UnfitError("label is not true or false", repr(values.get("label"))[:40], "write true or false")
    return _rated(_without(values, "label") | {"score": float(values["label"])})


def _chat(values: dict[str, Any]) -> Judged:
    """Chosen and rejected as whole chats; a column prompt repeats their beginning and is not needed."""
    chosen, rejected = (_messages(name, values.get(name)) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise UnfitError(
            "chosen and rejected have different prompts", f"{len(chosen)} and {len(rejected)} messages", LEAVE
        )
    if len(chosen) < 2 or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise UnfitError("chosen is no chat that ends with an answer", f"{len(chosen)} messages", LEAVE)
    rest = _without(values, "prompt", "chosen", "rejected", "messages")
    return Judged(chosen[:-1], [chosen[-1:], rejected[-1:]], [1.0, 0.0], rest, is_pair=True)


def _hh_rlhf(values: dict[str, Any]) -> Judged:
    chats = {name: _transcript(name, values.get(name)) for name in ("chosen", "rejected")}
    return _chat(_without(values, "prompt") | chats)


def _transcript(name: str, text: Any) -> Messages:
    """Human and Assistant turns of one text as messages."""
    parts = _TURN.split(text) if isinstance(text, str) else []
    if len(parts) < 5 or not is_blank(parts[0]):
        raise UnfitError(f"{name} is no transcript of Human: and Assistant: turns", repr(text)[:40], LEAVE)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _ultrafeedback(values: dict[str, Any]) -> Judged:
    """UltraFeedback's completions: the fine-grained mean rating, which its authors recommend over the overall one."""
    completions = values.get("completions")
    if not isinstance(completions, list) or not all(isinstance(item, dict) for item in completions):
        raise UnfitError(
            "column 'completions' is no list of objects", _names(values), "schema=scored takes lists of texts"
        )
    answers = [item.get("response") for item in completions]
    scores = [_first_number(item, ("fine-grained_score", "overall_score", "score")) for item in completions]
    rest = _without(values, *PROMPTS, "completions", "models", "correct_answers", "incorrect_answers")
    return _judged(_first(values, PROMPTS, "a prompt"), answers, scores, rest)


def _scored(values: dict[str, Any]) -> Judged:
    """Lists of answers and of scores (higher is better), or of ranks (1 is the best)."""
    answers = _first(values, ANSWERS, "a list of answers")
    ranked = next((values[name] for name in RANKS if values.get(name) is not None), None)
    given = ranked if ranked is not None else _first(values, SCORES, "scores or ranks")
    if not isinstance(answers, list) or not isinstance(given, list) or len(answers) != len(given):
        raise UnfitError("answers and scores are no lists of one length", _names(values), "one score for each answer")
    scores = [number(value) for value in given]
    if ranked is not None:
        scores = [None if value is None else -value for value in scores]
    return _judged(
        _first(values, PROMPTS, "a prompt"), answers, scores, _without(values, *PROMPTS, *ANSWERS, *SCORES, *RANKS)
    )


def _rated(values: dict[str, Any]) -> Judged:
    """One answer with its score; rows of one prompt belong together."""
    answer, score = _first(values, ONE_ANSWER, "an answer"), _first(values, ONE_SCORE, "a score")
    return _judged(
        _first(values, PROMPTS, "a prompt"),
        [answer],
        [number(score)],
        _without(values, *PROMPTS, *ONE_ANSWER, *ONE_SCORE),
    )


def _judged(prompt: Any, answers: list[Any], scores: list[float | None], rest: dict[str, Any]) -> Judged:
    if None in scores:
        raise UnfitError("a score is no number", str(scores)[:60], "give every answer a number")
    return Judged(prompt, answers, [score for score in scores if score is not None], rest)


LEAVE = "leave the row out"
SCHEMAS: dict[str, Callable[[dict[str, Any]], Judged]] = {
    "pairs": _pair,
    "unary": _unary,
    "chat": _chat,
    "hh_rlhf": _hh_rlhf,
    "ultrafeedback": _ultrafeedback,
    "scored": _scored,
    "rated": _rated,
}


def _messages(name: str, value: Any) -> Messages:
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise UnfitError(f"{name} is no list of messages", f"{type(value).__name__} {str(value)[:30]}", LEAVE)
    return value


def _first(values: dict[str, Any], names: tuple[str, ...], what: str) -> Any:
    found = next((values[name] for name in names if values.get(name) is not None), None)
    if found is None:
        raise UnfitError(
            f"no column with {what}", _names(values), f"known names are {', '.join(names)}: use data.columns"
        )
    return found


def _first_number(values: dict[str, Any], names: tuple[str, ...]) -> float | None:
    return next((found for name in names if (found := number(values.get(name))) is not None), None)


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _names(values: dict[str, Any]) -> str:
    return f"columns {', '.join(values)}"
