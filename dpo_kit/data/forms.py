"""How a source is recognised by its columns, and how its rows read: pairs, transcripts and whole chats of chosen and
rejected here, every other published form in other_forms.py.

Training and mode=convert read by it alike. What comes out is, under our names, a pair (prompt, chosen, rejected), a
thumb (prompt, completion, label), scored answers (prompt, answers, scores; higher is better) or a prompt alone. The
prompt of two whole conversations is left to rows.py. Columns that a form does not need stay: tools, system, ratings.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dpo_kit.config.settings import FormName
from dpo_kit.data.read import Fault, Row, UnfitError
from dpo_kit.data.rows import ANSWERS, is_blank, normalise, refuse_missing
from dpo_kit.data.spelling import LEAVE, looks_written, read_chat, unwritten
from dpo_kit.errors import DataError
from dpo_kit.model.chats import ROLES, TURN, open_turns

Values = dict[str, Any]
SAMPLE = 100  # rows by which forms of the same columns are told apart


# --- one row -----------------------------------------------------------------------------------------------------


def read_pair(values: Values, asked: str | None, better: str, worse: str) -> Values:
    """A prompt and two answers to it; or two whole conversations, cut where the prompt ends if there is one."""
    prompt = read_prompt(values, asked) if asked else None
    chosen, rejected = read_chat("chosen", values[better]), read_chat("rejected", values[worse])
    answers = {"chosen": chosen, "rejected": rejected}
    if not (_is_whole(chosen) and _is_whole(rejected)):
        return answers if prompt is None else alike({"prompt": prompt, **answers})
    if asked in CHATS or prompt is None or (isinstance(prompt, str) and is_blank(prompt)):
        return answers
    if isinstance(prompt, list) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    if not (_says(chosen, prompt) and _says(rejected, prompt)):
        remedy = "correct it, or set the column aside with data.columns={other_prompt: prompt}"
        raise UnfitError("prompt is not in the conversations of chosen and rejected", str(prompt)[:40], remedy)
    return answers


def read_prompt(values: Values, asked: str) -> Any:
    """What is asked; of alpaca's columns the instruction with its input, after its history."""
    prompt, more, history = read_chat("prompt", values.get(asked)), values.get("input"), values.get("history")
    if asked != "instruction" or not (more or history):
        return prompt
    if not isinstance(prompt, str) or not isinstance(more or "", str):
        raise UnfitError("instruction and input are no texts", str([prompt, more])[:40], "write both as text")
    text = f"{prompt}\n{more}" if more and not is_blank(more) else prompt
    if not history:
        return text
    turns = unwritten("history", history)
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise UnfitError("history is no list of turns", str(history)[:40], "a turn is [what was asked, what was said]")
    parts = [(role, part) for turn in turns for role, part in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": content} for role, content in [*parts, ("user", text)]]


def _is_whole(chat: Any) -> bool:
    """Whether an answer is a conversation that begins with what was asked."""
    are_messages = isinstance(chat, list) and len(chat) > 1 and all(isinstance(message, dict) for message in chat)
    return are_messages and chat[0].get("role") in ("system", "developer", "user")


def _says(chat: list[Values], prompt: Any) -> bool:
    if isinstance(prompt, list):
        return all(message in chat for message in prompt)
    asked = (str(message["content"]).strip() for message in chat if message["role"] == "user")
    return str(prompt).strip() in asked


def alike(made: Values) -> Values:
    """Text beside a chat as a turn of it: answers as the assistant's, a prompt as the user's."""
    answers = [name for name in made if name != "prompt"]
    if isinstance(made["prompt"], list):
        return made | {name: as_turn("assistant", made[name]) for name in answers}
    if all(isinstance(made[name], list) for name in answers):
        return made | {"prompt": as_turn("user", made["prompt"])}
    return made


def as_turn(role: str, value: Any) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _transcripts(values: Values, asked: str | None, better: str, worse: str) -> Values:
    """Texts of Human: and Assistant: turns: both answers with all that came before, or a prompt and two answers."""
    prompt, answers = values.get(asked) if asked else None, {"chosen": values[better], "rejected": values[worse]}
    if _is_transcript(prompt) and not _is_transcript(answers["chosen"]):
        return alike({"prompt": open_transcript(prompt), **answers})
    chats = {name: _transcript(name, text) for name, text in answers.items()}
    if isinstance(prompt, str) and not all(str(text).strip().startswith(prompt.strip()) for text in answers.values()):
        raise UnfitError("prompt is not how chosen and rejected begin", repr(prompt[:40]), LEAVE)
    return chats


def _transcript(name: str, text: Any) -> list[Values]:
    parts = TURN.split(text) if isinstance(text, str) else []
    if len(parts) < 5 or not is_blank(parts[0]):
        raise UnfitError(f"{name} is no transcript of Human: and Assistant: turns", repr(text)[:40], LEAVE)
    return [{"role": ROLES[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)]


def open_transcript(prompt: Any) -> Any:
    """A prompt that is a transcript up to the last Assistant: as messages; any other as it is."""
    if not _is_transcript(prompt):
        return prompt
    if not (turns := open_turns(prompt)):
        raise UnfitError("prompt is a transcript that does not end with Assistant:", repr(prompt[-40:]), LEAVE)
    return turns


def _is_transcript(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


# --- the table ---------------------------------------------------------------------------------------------------


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


def _are_whole(values: Values, *names: str) -> bool:
    return all(_is_whole(read_chat("answer", values[name])) for name in names[-2:])


def _are_transcripts(values: Values, asked: str | None, *answers: str) -> bool:
    return any(_is_transcript(values.get(name)) for name in (asked, answers[0]) if name)


CHATS = ("messages", "conversations")
ASKED = "prompt|instruction|question|query|input|context"
DECIDED = (  # columns chosen and rejected say what a row is, whatever stands beside them
    Form("chat", "prompt? chosen rejected", "pairs", read_pair, _are_whole),
    Form("hh_rlhf", "prompt? chosen rejected", "pairs", _transcripts, _are_transcripts),
    Form("pairs", f"{ASKED}|messages|conversations? chosen rejected", "pairs", read_pair),
)
WEAK = {"prompts": 0, "rated": 1}  # what says less of a row than any pair, thumb or list does


# --- a source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A form and the columns of a source that it is read from; `texts` are those whose chats are written as text."""

    form: Form
    names: tuple[str | None, ...]
    columns: dict[str, str]
    texts: tuple[str, ...] = ()

    def __str__(self) -> str:
        note = f"; chats written as text: {', '.join(self.texts)}" if self.texts else ""
        return f"{self.form.name} ({', '.join(name for name in self.names if name)}{note})"

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

    def read(self, row: Row) -> Row | Fault:
        """`row` under our names, checked; scored answers are checked when they are paired."""
        values = rename(row.values, self.columns)
        try:
            refuse_missing(values, self.required)
            values = values | {
                name: unwritten(name, values[name]) for name in self.texts if values.get(name) is not None
            }
            made = self.form.read(values, *self.names)
        except UnfitError as unfit:
            return unfit.at(row.place)
        taken = {*made, *self.names, *(("input", "history") if "instruction" in self.names else ())}
        made |= {name: value for name, value in values.items() if name not in taken}
        kind: Any = self.form.rows if self.form.rows in ANSWERS else "prompts"
        return normalise(Row(row.place, made, row.typed), kind)


def rename(values: Values, columns: dict[str, str]) -> Values:
    """`values` with our names of `columns` (ours: theirs) for theirs."""
    if not columns:
        return values
    ours = {mine: values[theirs] for mine, theirs in columns.items() if theirs in values}
    return {name: value for name, value in values.items() if name not in columns.values()} | ours


def recognise(
    path: str, rows: Sequence[Row], columns: dict[str, str], asked: FormName | None = None, *, bare: bool = False
) -> Match:
    """The form of `rows`, or `asked` itself; prompts alone only where they may be `bare`.

    Raises DataError with what to say where the columns fit no form or several.
    """
    if columns:
        theirs = {name for row in rows for name in row.values}
        for mine, name in columns.items():
            if name not in theirs:
                near = difflib.get_close_matches(name, theirs, n=1) or sorted(theirs)
                raise DataError(f"{path} has no column {name!r} (data.columns.{mine}); it has {', '.join(near)}")
    renamed = [rename(row.values, columns) for row in rows]
    names = {name for values in renamed for name, value in values.items() if value is not None}
    matches = [match for form in _candidates(names, asked) if (match := _match(form, names, columns))]
    matches = [match for match in matches if asked or match.fits(renamed[:SAMPLE])]
    matches = [match for match in matches if bare or match.form.rows != "prompts"]
    matches = [match for match in matches if not any(_beats(other, match) for other in matches)]
    if len(matches) != 1:
        raise _refusal(path, rows, names, matches, asked)
    (match,) = matches
    for group in match.form.columns.split():  # several columns could be the same thing, and none has its usual name
        usual, *others = group.rstrip("?").split("|")
        present = [name for name in others if name in names and not (name == "input" and "instruction" in names)]
        if usual not in names and len(present) > 1:
            raise DataError(
                f"{path}: {' or '.join(present)} could be the column {usual!r}: say which with "
                f"data.columns={{{usual}: {present[0]}}}"
            )
    texts = []  # columns of which half or more of the values are texts that begin as a chat does
    for name in filter(None, match.names):
        values = [values[name] for values in renamed if values.get(name) is not None]
        texts += [name] if 2 * sum(map(looks_written, values)) >= len(values) else []
    return replace(match, texts=tuple(texts))


def _candidates(names: set[str], asked: FormName | None) -> Sequence[Form]:
    """The forms that the columns `names` may be of; the one that is `asked` for alone."""
    if asked is None and {"chosen", "rejected"} <= names:
        return DECIDED
    from dpo_kit.data.other_forms import FORMS

    return [FORMS[asked]] if asked else [*FORMS.values()]


def _match(form: Form, names: set[str], columns: dict[str, str]) -> Match | None:
    given = []
    for group in form.columns.split():
        name = next((name for name in group.rstrip("?").split("|") if name in names), None)
        if name is None and not group.endswith("?"):
            return None
        given.append(name)
    return Match(form, tuple(given), columns)


def _beats(one: Match, other: Match) -> bool:
    """Whether `one` says more of a row: answers, more columns, or which of the forms of the same columns it is."""
    mine, theirs = {*one.required}, {*other.required}
    worth = [WEAK.get(match.form.rows, len(WEAK)) for match in (one, other)]
    if worth[0] != worth[1]:
        return worth[0] > worth[1]
    return mine > theirs or (mine == theirs and bool(one.form.fits) > bool(other.form.fits))


def _refusal(path: str, rows: Sequence[Row], names: set[str], matches: Sequence[Match], asked: Any) -> DataError:
    if matches:
        options = " or ".join(f"data.form={match.form.name}" for match in matches)
        return DataError(f"{path} could be read as {' or as '.join(map(str, matches))}: say which with {options}")
    from dpo_kit.data.other_forms import FORMS

    empty = sorted({name for row in rows for name in row.values} - names)
    has = f"{path} has the columns {', '.join(sorted(names))}" + (f" (nothing in {', '.join(empty)})" if empty else "")
    if asked:
        alone = "; prompts alone train method=online_dpo" if asked == "prompts" else ""
        return DataError(f"{has}; data.form={asked} needs {FORMS[asked].columns}: map them with data.columns{alone}")
    wanted = ("prompt", "chosen", "rejected", "completion", "label")
    near = {name: difflib.get_close_matches(name, names - {*wanted}, n=1) for name in wanted if name not in names}
    hint = ", ".join(f"{name}: {matching[0]}" for name, matching in near.items() if matching)
    others = ", ".join(form.name for form in FORMS.values() if form.name not in ("pairs", "unary", "rated", "prompts"))
    return DataError(
        f"{has}; needed are prompt, chosen, rejected (pairs) or prompt, completion, label (unary): map them with "
        f"data.columns={{{hint or 'chosen: …, rejected: …'}}}. Known by their columns are also {others}"
    )
