"""How a source is recognised by its columns, and how its rows read: the table of all published forms.

Training and mode=convert read by it alike. What comes out is, under our names, a pair (prompt, chosen, rejected), a
thumb (prompt, completion, label), scored answers (prompt, answers, scores; higher is better) or a prompt alone. The
prompt of two whole conversations is left to rows.py. Columns that a form does not need stay: tools, system, ratings.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dpo_kit.config.settings import FormName
from dpo_kit.data.read import Fault, Row, Tie, TieError, UnfitError
from dpo_kit.data.report.figures import number
from dpo_kit.data.rows import ANSWERS, is_blank, normalise, refuse_missing
from dpo_kit.data.spelling import LEAVE, conversation, looks_written, read_chat, unwritten
from dpo_kit.errors import DataError
from dpo_kit.model.chats import ROLES, TURN, open_turns

Values = dict[str, Any]
SAMPLE = 100  # rows by which forms of the same columns are told apart
RANKS = ("ranks", "ranking", "rank")
ITEM_ANSWERS = ("response", "completion", "answer", "text", "content")
ITEM_SCORES = ("fine-grained_score", "overall_score", "score", "rating")  # UltraFeedback's authors recommend the first

# --- pairs -------------------------------------------------------------------------------------------------------


def read_pair(values: Values, asked: str | None, better: str, worse: str) -> Values:
    """A prompt and two answers to it; or two whole conversations, cut where the prompt ends if there is one."""
    prompt = _prompt(values, asked) if asked else None
    chosen, rejected = read_chat("chosen", values[better]), read_chat("rejected", values[worse])
    answers = {"chosen": chosen, "rejected": rejected}
    if not (_is_whole(chosen) and _is_whole(rejected)):
        return answers if prompt is None else _alike({"prompt": prompt, **answers})
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


def _prompt(values: Values, asked: str) -> Any:
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


def _alike(made: Values) -> Values:
    """Text beside a chat as a turn of it: answers as the assistant's, a prompt as the user's."""
    answers = [name for name in made if name != "prompt"]
    if isinstance(made["prompt"], list):
        return made | {name: _as_turn("assistant", made[name]) for name in answers}
    all_chats = all(isinstance(made[name], list) for name in answers)
    return made | {"prompt": _as_turn("user", made["prompt"])} if all_chats else made


def _as_turn(role: str, value: Any) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _transcripts(values: Values, asked: str | None, better: str, worse: str) -> Values:
    """Texts of Human: and Assistant: turns: both answers with all that came before, or a prompt and two answers."""
    prompt, answers = values.get(asked) if asked else None, {"chosen": values[better], "rejected": values[worse]}
    if _is_transcript(prompt) and not _is_transcript(answers["chosen"]):
        return _alike({"prompt": _open_transcript(prompt), **answers})
    chats = {}
    for name, text in answers.items():
        parts = TURN.split(text) if isinstance(text, str) else []
        if len(parts) < 5 or not is_blank(parts[0]):
            raise UnfitError(f"{name} is no transcript of Human: and Assistant: turns", repr(text)[:40], LEAVE)
        turns = zip(parts[1::2], parts[2::2], strict=True)
        chats[name] = [{"role": ROLES[who], "content": said.strip()} for who, said in turns]
    if isinstance(prompt, str) and not all(str(text).strip().startswith(prompt.strip()) for text in answers.values()):
        raise UnfitError("prompt is not how chosen and rejected begin", repr(prompt[:40]), LEAVE)
    return chats


def _open_transcript(prompt: Any) -> Any:
    """A prompt that is a transcript up to the last Assistant: as messages; any other as it is."""
    if not _is_transcript(prompt):
        return prompt
    if not (turns := open_turns(prompt)):
        raise UnfitError("prompt is a transcript that does not end with Assistant:", repr(prompt[-40:]), LEAVE)
    return turns


def _is_transcript(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _rejected_turn(values: Values, chat: str, worse: str) -> Values:
    prompt, chosen = _last_turn(chat, values[chat])
    return {"prompt": prompt, "chosen": chosen, "rejected": _as_turn("assistant", read_chat("rejected", values[worse]))}


def _last_turn(name: str, value: Any) -> tuple[list[Values], list[Values]]:
    """A conversation without its last message, and that message, which must be the assistant's."""
    chat = conversation(name, value)
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise UnfitError(f"{name} is no chat that ends with an answer", f"{len(chat)} messages", LEAVE)
    return chat[:-1], chat[-1:]


def _whole(values: Values, better: str, worse: str) -> Values:
    return {"chosen": conversation(better, values[better]), "rejected": conversation(worse, values[worse])}


def _good_and_bad(values: Values, asked: str, answers: str) -> Values:
    both = unwritten(answers, values[answers])
    if not isinstance(both, list) or len(both) != 2:
        raise UnfitError(f"{answers} is no list of two answers", str(both)[:40], "the better one, then the worse one")
    return read_pair(values | {"chosen": both[0], "rejected": both[1]}, asked, "chosen", "rejected")


def _openai(values: Values, asked: str, better: str, worse: str) -> Values:
    given = unwritten(asked, values[asked])
    if not isinstance(given, dict):
        raise UnfitError(f"{asked} is no object with messages", str(given)[:40], '{"messages": […]}')
    others = {key: value for key, value in given.items() if key != "messages"}
    return others | read_pair(values | {asked: conversation(asked, given.get("messages"))}, asked, better, worse)


def _compared(verdicts: dict[str, int], read: Callable[..., Values] = read_pair) -> Callable[..., Values]:
    """Two answers and a column that says which is better: `verdicts` has 1 for the first, -1 the second, 0 neither."""

    def compare(values: Values, *names: str) -> Values:
        *asked, first, second, verdict = names
        given = values[verdict]
        better = verdicts.get(f"{given:g}" if isinstance(given, float) else str(given).strip().lower())
        if better is None:
            raise UnfitError(f"{verdict} names no answer", repr(given)[:40], f"known are {', '.join(verdicts)}")
        if better == 0:
            raise TieError("neither answer is better", f"{verdict}: {given}", "nothing to do: a tie is no preference")
        return read(values, *asked, *((first, second) if better > 0 else (second, first)))

    return compare


# --- thumbs, scored answers, prompts -----------------------------------------------------------------------------


def _thumb(values: Values, asked: str, answer: str, label: str) -> Values:
    completion = read_chat("completion", values[answer])
    return _alike({"prompt": _prompt(values, asked), "completion": completion}) | {"label": values[label]}


def _thumb_of_chat(values: Values, chat: str, label: str) -> Values:
    prompt, answer = _last_turn(chat, values[chat])
    return {"prompt": prompt, "completion": answer, "label": values[label]}


def _items(values: Values, asked: str, items: str) -> Values:
    """Answers as objects, each with its rank (lower is better) or its score."""
    given = unwritten(items, values[items])
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise UnfitError(f"column {items!r} is no list of objects", str(given)[:40], "data.form=scored reads texts")
    answers = [next((item[name] for name in ITEM_ANSWERS if item.get(name) is not None), None) for item in given]
    ranks = [number(item.get("rank")) for item in given]
    scores = [next((n for name in ITEM_SCORES if (n := number(item.get(name))) is not None), None) for item in given]
    worth = [score if rank is None else -rank for rank, score in zip(ranks, scores, strict=True)]
    return _with_scores(_open_transcript(_prompt(values, asked)), answers, worth)


def _scored(values: Values, asked: str, answers: str, scores: str) -> Values:
    """Lists of answers and of scores (higher is better), or of ranks (1 is the best)."""
    texts, worth = unwritten(answers, values[answers]), unwritten(scores, values[scores])
    if not isinstance(texts, list) or not isinstance(worth, list) or len(texts) != len(worth):
        raise UnfitError("answers and scores are no lists of one length", f"{answers}, {scores}", "a score for each")
    sign = -1 if scores in RANKS else 1
    numbers = [None if (score := number(given)) is None else sign * score for given in worth]
    return _with_scores(_prompt(values, asked), texts, numbers)


def _rated(values: Values, asked: str, answer: str, score: str) -> Values:
    """One answer with its score; rows of one prompt belong together."""
    return _with_scores(_prompt(values, asked), [values[answer]], [number(values[score])])


def _with_scores(prompt: Any, answers: list[Any], scores: list[float | None]) -> Values:
    if None in scores or not scores:
        reason = "a score is no number" if scores else "there is no answer"
        raise UnfitError(reason, str(scores)[:60], "give every answer a number")
    return {"prompt": prompt, "answers": [read_chat("answer", answer) for answer in answers], "scores": scores}


def best_and_worst(row: Row) -> Row | Fault:
    """The best of a row's scored answers against the worst, as a pair."""
    scores = row.values["scores"]
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    if scores[order[0]] == scores[order[-1]]:
        return Tie(row.place, "no two answers that differ in score", f"scores {scores}"[:60], "nothing to do")
    return normalise(Row(row.place, prefer(row.values, order[0], order[-1]), row.typed), "pairs")


def prefer(values: Values, better: int, worse: int) -> Values:
    """A pair of two of the scored answers."""
    pair = {"prompt": values["prompt"], "chosen": values["answers"][better], "rejected": values["answers"][worse]}
    scores = {"score_chosen": values["scores"][better], "score_rejected": values["scores"][worse]}
    rest = {name: value for name, value in values.items() if name not in ("prompt", "answers", "scores")}
    return _alike(pair) | scores | rest


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


def _are_listed(values: Values, asked: str, answers: str) -> bool:
    return isinstance(values[answers], list) or str(values[answers]).startswith("[")


CHATS = ("messages", "conversations")
ASKED = "prompt|instruction|question|query|input|context"
SEVERAL = "answers|responses|completions|candidates|generations"
FIRST_0, FIRST_1 = {"0": 1, "1": -1}, {"1": 1, "0": -1}
ARENA = {"model_a": 1, "model_b": -1, "a": 1, "b": -1}
ARENA |= dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "bothbad", "both bad"), 0)
STRENGTH = {"-3": 1, "-2": 1, "-1": 1, "0": 0, "1": -1, "2": -1, "3": -1}
DECIDED = (  # columns chosen and rejected say what a row is, whatever stands beside them
    Form("chat", "prompt? chosen rejected", "pairs", read_pair, _are_whole),
    Form("hh_rlhf", "prompt? chosen rejected", "pairs", _transcripts, _are_transcripts),
    Form("pairs", f"{ASKED}|messages|conversations? chosen rejected", "pairs", read_pair),
)
TABLE = (
    *DECIDED,
    Form("responses", f"{ASKED} chosen_response rejected_response", "pairs", read_pair),
    Form("stack_exchange", "question response_j response_k", "pairs", read_pair),
    Form("unary", f"{ASKED} completion|response|output label|kto_tag", "unary", _thumb),
    Form("chat_unary", "messages|conversations label|kto_tag", "unary", _thumb_of_chat),
    Form("swift", "messages|conversations rejected_response", "pairs", _rejected_turn),
    Form("swift_chat", "messages|conversations rejected_messages", "pairs", _whole),
    Form("alpaca", "instruction output", "pairs", _good_and_bad, _are_listed),
    Form("openai", "input preferred_output non_preferred_output", "pairs", _openai),
    Form("pku_saferlhf", "prompt response_0 response_1 better_response_id", "pairs", _compared(FIRST_0)),
    Form("shp", "history human_ref_A human_ref_B labels", "pairs", _compared(FIRST_1)),
    Form("arena", "conversation_a conversation_b winner", "pairs", _compared(ARENA, _whole)),
    Form("arena_text", "prompt|question response_a response_b winner", "pairs", _compared(ARENA)),
    Form("helpsteer", "prompt response_1 response_2 preference_strength", "pairs", _compared(STRENGTH)),
    Form("helpsteer3", "context response1 response2 overall_preference", "pairs", _compared(STRENGTH)),
    Form("ultrafeedback", "instruction completions", "scored", _items),
    Form("ranked", "prompt|context|question completions|answers", "scored", _items),
    Form("scored", f"{ASKED} {SEVERAL} scores|ratings|rating|{'|'.join(RANKS)}", "scored", _scored),
    Form("rated", f"{ASKED} completion|response|answer|output score|rating", "rated", _rated),
    Form("prompts", f"{ASKED}|messages|conversations", "prompts", lambda row, asked: {"prompt": _prompt(row, asked)}),
)  # fmt: skip
FORMS = {form.name: form for form in TABLE}
WEAK = {"prompts": 0, "rated": 1}  # what says less of a row than any pair, thumb or list does

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
    matches = []
    for form in [FORMS[asked]] if asked else DECIDED if {"chosen", "rejected"} <= names else TABLE:
        groups = form.columns.split()
        given = [next((name for name in group.rstrip("?").split("|") if name in names), None) for group in groups]
        match = Match(form, tuple(given), columns)
        if all(name or group.endswith("?") for group, name in zip(groups, given, strict=True)):
            matches += [match] if (asked or match.fits(renamed[:SAMPLE])) and (bare or form.rows != "prompts") else []
    matches = [match for match in matches if not any(other.beats(match) for other in matches)]
    if len(matches) != 1:
        raise DataError(f"{path} {_why_not_one(matches, names, sorted(theirs - names), asked)}")
    (match,) = matches
    for group in match.form.columns.split():  # several columns could be the same thing, and none has its usual name
        usual, *others = group.rstrip("?").split("|")
        present = [name for name in others if name in names and not (name == "input" and "instruction" in names)]
        if usual not in names and len(present) > 1:
            which = f"say which with data.columns={{{usual}: {present[0]}}}"
            raise DataError(f"{path}: {' or '.join(present)} could be the column {usual!r}: {which}")
    for name in filter(None, match.names):  # of which half or more of the values are texts that begin as a chat does
        values = [values[name] for values in renamed if values.get(name) is not None]
        match.texts += (name,) if 2 * sum(map(looks_written, values)) >= len(values) else ()
    return match


def _why_not_one(matches: Sequence[Match], names: set[str], empty: list[str], asked: FormName | None) -> str:
    """What is said of columns `names` (and of `empty` ones) that fit several forms or none."""
    if matches:
        options = " or ".join(f"data.form={match.form.name}" for match in matches)
        return f"could be read as {' or as '.join(map(str, matches))}: say which with {options}"
    has = f"has the columns {', '.join(sorted(names))}" + (f" (nothing in {', '.join(empty)})" if empty else "")
    if asked:
        alone = "; prompts alone train method=online_dpo" if asked == "prompts" else ""
        return f"{has}; data.form={asked} needs {FORMS[asked].columns}: map them with data.columns{alone}"
    wanted = ("prompt", "chosen", "rejected", "completion", "label")
    near = {name: difflib.get_close_matches(name, names - {*wanted}, n=1) for name in wanted if name not in names}
    hint = ", ".join(f"{name}: {matching[0]}" for name, matching in near.items() if matching)
    others = ", ".join(name for name in FORMS if name not in ("pairs", "unary", "rated", "prompts"))
    return (
        f"{has}; needed are prompt, chosen, rejected (pairs) or prompt, completion, label (unary): map them with "
        f"data.columns={{{hint or 'chosen: …, rejected: …'}}}. Known by their columns are also {others}"
    )
