"""How a source is recognised by its columns, and how its rows read: pairs here, all other forms in published.py.

Training and mode=convert read by them alike. What comes out is, under our names, a pair (prompt, chosen, rejected), a
thumb (prompt, completion, label), scored answers (prompt, answers, scores; higher is better) or a prompt alone. The
prompt of two whole conversations is left to rows.py. Columns that a form does not need stay: tools, system, ratings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dpo_kit.config.settings import FormName
from dpo_kit.data.read import Fault, Row, UnfitError
from dpo_kit.data.rows import ANSWERS, is_blank, is_plain, normalise, refuse_missing
from dpo_kit.errors import DataError

Values = dict[str, Any]
SAMPLE = 100  # rows by which forms of the same columns are told apart
CHATS = ("messages", "conversations")
ASKED = "prompt|instruction|question|query|input|context"
WEAK = {"prompts": 0, "rated": 1}  # what says less of a row than any pair, thumb or list does
_WRITTEN = re.compile(r"""\s*\[?\s*\{\s*["'](role|from|content|value)["']\s*:""")  # as a chat in JSON or Python begins


@dataclass(frozen=True)
class Form:
    """`columns`: those that a form needs, alternatives with the usual name first, a last `?` where one may be missing.
    `read` makes a row of the kind `rows` of a row and the names of those columns. `fits` tells forms of the same
    columns apart, by a row.
    """

    name: FormName
    columns: str
    rows: str  # pairs | unary | scored | rated (scored, one answer a row) | prompts
    read: Callable[..., Values]
    fits: Callable[..., bool] | None = None


# --- pairs -------------------------------------------------------------------------------------------------------


def read_pair(values: Values, asked: str | None, better: str, worse: str) -> Values:
    """A prompt and two answers to it; or two whole conversations, cut where the prompt ends if there is one."""
    prompt = read_prompt(values, asked) if asked else None
    chosen, rejected = as_chat("chosen", values[better]), as_chat("rejected", values[worse])
    answers = {"chosen": chosen, "rejected": rejected}
    if not (_is_whole(chosen) and _is_whole(rejected)):
        return answers if prompt is None else alike({"prompt": prompt, **answers})
    if asked in CHATS or prompt is None or (isinstance(prompt, str) and is_blank(prompt)):
        return answers
    if isinstance(prompt, list) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    for chat in (chosen, rejected):
        texts = (str(message["content"]).strip() for message in chat if message["role"] == "user")
        is_list = isinstance(prompt, list)
        if not (all(turn in chat for turn in prompt) if is_list else str(prompt).strip() in texts):
            remedy = "correct it, or set the column aside with data.columns={other_prompt: prompt}"
            raise UnfitError("prompt is not in the conversations of chosen and rejected", str(prompt)[:40], remedy)
    return answers


def as_chat(name: str, value: Any) -> Any:
    """`value` as messages where it is one or a list of them, in any spelling; else as it is. Raises UnfitError."""
    if not isinstance(value, list | dict) or (isinstance(value, list) and all(map(is_plain, value))):
        return value
    from dpo_kit.data.spelling import read_chat

    return read_chat(name, value)


def read_prompt(values: Values, asked: str) -> Any:
    """What is asked; of alpaca's columns the instruction with its input, after its history."""
    prompt = as_chat("prompt", values.get(asked))
    if asked != "instruction" or not (values.get("input") or values.get("history")):
        return prompt
    from dpo_kit.data.published import add_input

    return add_input(prompt, values.get("input"), values.get("history"))


def _is_whole(chat: Any) -> bool:
    """Whether an answer is a conversation that begins with what was asked."""
    are_messages = isinstance(chat, list) and len(chat) > 1 and all(isinstance(message, dict) for message in chat)
    return are_messages and chat[0].get("role") in ("system", "developer", "user")


def alike(made: Values) -> Values:
    """Text beside a chat as a turn of it: answers as the assistant's, a prompt as the user's."""
    answers = [name for name in made if name != "prompt"]
    if isinstance(made["prompt"], list):
        return made | {name: _as_turn("assistant", made[name]) for name in answers}
    all_chats = all(isinstance(made[name], list) for name in answers)
    return made | {"prompt": _as_turn("user", made["prompt"])} if all_chats else made


def _as_turn(role: str, value: Any) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def is_transcript(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _transcripts(values: Values, *names: Any) -> Values:
    from dpo_kit.data.published import read_transcripts

    return read_transcripts(values, *names)


def _are_whole(values: Values, *names: str) -> bool:
    return all(_is_whole(as_chat("answer", values[name])) for name in names[-2:])


def _are_transcripts(values: Values, asked: str | None, *answers: str) -> bool:
    return any(is_transcript(values.get(name)) for name in (asked, answers[0]) if name)


DECIDED = (  # columns chosen and rejected say what a row is, whatever stands beside them
    Form("chat", "prompt? chosen rejected", "pairs", read_pair, _are_whole),
    Form("hh_rlhf", "prompt? chosen rejected", "pairs", _transcripts, _are_transcripts),
    Form("pairs", f"{ASKED}|messages|conversations? chosen rejected", "pairs", read_pair),
)

# --- a source ----------------------------------------------------------------------------------------------------


@dataclass
class Match:
    """A form and the columns of a source that it is read from; `texts` are those whose chats are written as text."""

    form: Form
    names: tuple[str | None, ...]
    columns: dict[str, str]
    texts: tuple[str, ...] = ()

    def __str__(self) -> str:
        note = f"; chats written as text: {', '.join(self.texts)}" if self.texts else ""
        return f"{self.form.name} ({', '.join(filter(None, self.names))}{note})"

    @property
    def required(self) -> tuple[str, ...]:
        groups = zip(self.form.columns.split(), self.names, strict=True)
        return tuple(name for group, name in groups if name and not group.endswith("?"))

    def fits(self, sample: Sequence[Values]) -> bool:
        """Whether half or more of the whole rows of `sample` are of this form."""
        if self.form.fits is None:
            return True
        whole = [values for values in sample if all(values.get(name) is not None for name in self.required)]
        fitting = 0
        for values in whole:
            with suppress(UnfitError):
                fitting += self.form.fits(values, *self.names)
        return 2 * fitting >= len(whole)

    def beats(self, other: Match) -> bool:
        """Whether it says more of a row: answers, more columns, or which of the forms of the same columns it is."""
        mine, theirs = {*self.required}, {*other.required}
        worth, other_worth = (WEAK.get(match.form.rows, len(WEAK)) for match in (self, other))
        if worth != other_worth:
            return worth > other_worth
        return mine > theirs or (mine == theirs and bool(self.form.fits) > bool(other.form.fits))

    def read(self, row: Row) -> Row | Fault:
        """`row` under our names, checked; scored answers are checked when they are paired."""
        values = rename(row.values, self.columns)
        try:
            refuse_missing(values, self.required)
            if self.texts:
                from dpo_kit.data.spelling import unwritten

                values |= {name: unwritten(name, values[name]) for name in self.texts if values.get(name) is not None}
            made = self.form.read(values, *self.names)
        except UnfitError as unfit:
            return unfit.at(row.place)
        taken = {*made, *self.names, *(("input", "history") if "instruction" in self.names else ())}
        made |= {name: value for name, value in values.items() if name not in taken}
        kind: Any = self.form.rows if self.form.rows in ANSWERS else "prompts"
        return normalise(Row(row.place, made, row.typed), kind)


def rename(values: Values, columns: dict[str, str]) -> Values:
    """A copy of `values` with our names of `columns` (ours: theirs) for theirs."""
    ours = {mine: values[theirs] for mine, theirs in columns.items() if theirs in values}
    return {name: value for name, value in values.items() if name not in columns.values()} | ours


def recognise(
    path: str, rows: Sequence[Row], columns: dict[str, str], asked: FormName | None = None, *, bare: bool = False
) -> Match:
    """The form of `rows`, or `asked` itself; prompts alone only if they may be `bare`. DataError: none or several."""
    theirs = {name for row in rows for name in row.values}
    for mine, name in columns.items():
        if name not in theirs:
            near = difflib.get_close_matches(name, theirs, n=1) or sorted(theirs)
            raise DataError(f"{path} has no column {name!r} (data.columns.{mine}); it has {', '.join(near)}")
    renamed = [rename(row.values, columns) for row in rows]
    names = {name for values in renamed for name, value in values.items() if value is not None}
    forms: tuple[Form, ...] = DECIDED
    matches = []
    if asked or not {"chosen", "rejected"} <= names:
        from dpo_kit.data.published import FORMS, TABLE

        forms = (FORMS[asked],) if asked else TABLE
    for form in forms:
        groups = form.columns.split()
        given = [next((name for name in group.rstrip("?").split("|") if name in names), None) for group in groups]
        match = Match(form, tuple(given), columns)
        if all(name or group.endswith("?") for group, name in zip(groups, given, strict=True)):
            matches += [match] if (asked or match.fits(renamed[:SAMPLE])) and (bare or form.rows != "prompts") else []
    matches = [match for match in matches if not any(other.beats(match) for other in matches)]
    if len(matches) > 1:
        options = " or ".join(f"data.form={match.form.name}" for match in matches)
        raise DataError(f"{path} could be read as {' or as '.join(map(str, matches))}: say which with {options}")
    if not matches:
        from dpo_kit.data.published import why_none

        raise DataError(f"{path} {why_none(names, sorted(theirs - names), asked)}")
    (match,) = matches
    for group in match.form.columns.split():  # several columns could be the same thing, and none has its usual name
        usual, *others = group.rstrip("?").split("|")
        present = [name for name in others if name in names and not (name == "input" and "instruction" in names)]
        if usual not in names and len(present) > 1:
            which = f"say which with data.columns={{{usual}: {present[0]}}}"
            raise DataError(f"{path}: {' or '.join(present)} could be the column {usual!r}: {which}")
    for name in filter(None, match.names):  # of which half or more of the values are texts that begin as a chat does
        values = [values[name] for values in renamed if values.get(name) is not None]
        written = sum(isinstance(value, str) and _WRITTEN.match(value) is not None for value in values)
        match.texts += (name,) if 2 * written >= len(values) else ()
    return match
