"""The published forms of rows beside pairs: how each reads, and what is said of columns that fit none."""

import difflib
from collections.abc import Callable
from typing import Any

from dpo_kit.config.settings import FormName
from dpo_kit.data.forms import ASKED, DECIDED, Form, Values, alike, as_chat, is_transcript, read_pair, read_prompt
from dpo_kit.data.read import Fault, Row, Tie, TieError, UnfitError
from dpo_kit.data.report.figures import number
from dpo_kit.data.rows import is_blank, normalise
from dpo_kit.data.spelling import LEAVE, conversation, unwritten
from dpo_kit.model.chats import ROLES, TURN, open_turns

RANKS = ("ranks", "ranking", "rank")
ITEM_ANSWERS = ("response", "completion", "answer", "text", "content")
ITEM_SCORES = ("fine-grained_score", "overall_score", "score", "rating")  # UltraFeedback's authors recommend the first

# --- pairs -------------------------------------------------------------------------------------------------------


def add_input(prompt: Any, more: Any, history: Any) -> Any:
    """An instruction of alpaca's with its input, after its history."""
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


def read_transcripts(values: Values, asked: str | None, better: str, worse: str) -> Values:
    """Texts of Human: and Assistant: turns: both answers with all that came before, or a prompt and two answers."""
    prompt, answers = values.get(asked) if asked else None, {"chosen": values[better], "rejected": values[worse]}
    if is_transcript(prompt) and not is_transcript(answers["chosen"]):
        return alike({"prompt": _open_transcript(prompt), **answers})
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
    if not is_transcript(prompt):
        return prompt
    if not (turns := open_turns(prompt)):
        raise UnfitError("prompt is a transcript that does not end with Assistant:", repr(prompt[-40:]), LEAVE)
    return turns


def _rejected_turn(values: Values, chat: str, worse: str) -> Values:
    prompt, chosen = _last_turn(chat, values[chat])
    return alike({"prompt": prompt, "chosen": chosen, "rejected": as_chat("rejected", values[worse])})


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
    completion = as_chat("completion", values[answer])
    return alike({"prompt": read_prompt(values, asked), "completion": completion}) | {"label": values[label]}


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
    return _with_scores(_open_transcript(read_prompt(values, asked)), answers, worth)


def _scored(values: Values, asked: str, answers: str, scores: str) -> Values:
    """Lists of answers and of scores (higher is better), or of ranks (1 is the best)."""
    texts, worth = unwritten(answers, values[answers]), unwritten(scores, values[scores])
    if not isinstance(texts, list) or not isinstance(worth, list) or len(texts) != len(worth):
        raise UnfitError("answers and scores are no lists of one length", f"{answers}, {scores}", "a score for each")
    sign = -1 if scores in RANKS else 1
    numbers = [None if (score := number(given)) is None else sign * score for given in worth]
    return _with_scores(read_prompt(values, asked), texts, numbers)


def _rated(values: Values, asked: str, answer: str, score: str) -> Values:
    """One answer with its score; rows of one prompt belong together."""
    return _with_scores(read_prompt(values, asked), [values[answer]], [number(values[score])])


def _with_scores(prompt: Any, answers: list[Any], scores: list[float | None]) -> Values:
    if None in scores or not scores:
        reason = "a score is no number" if scores else "there is no answer"
        raise UnfitError(reason, str(scores)[:60], "give every answer a number")
    return {"prompt": prompt, "answers": [as_chat("answer", answer) for answer in answers], "scores": scores}


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
    return alike(pair) | scores | rest


# --- the table ---------------------------------------------------------------------------------------------------


def _are_listed(values: Values, asked: str, answers: str) -> bool:
    return isinstance(values[answers], list) or str(values[answers]).startswith("[")


SEVERAL = "answers|responses|completions|candidates|generations"
FIRST_0, FIRST_1 = {"0": 1, "1": -1}, {"1": 1, "0": -1}
ARENA = {"model_a": 1, "model_b": -1, "a": 1, "b": -1}
ARENA |= dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "bothbad", "both bad"), 0)
STRENGTH = {"-3": 1, "-2": 1, "-1": 1, "0": 0, "1": -1, "2": -1, "3": -1}
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
    Form("prompts", f"{ASKED}|messages|conversations", "prompts", lambda row, name: {"prompt": read_prompt(row, name)}),
)  # fmt: skip
FORMS = {form.name: form for form in TABLE}


def why_none(names: set[str], empty: list[str], asked: FormName | None) -> str:
    """What is said of columns `names` (and of `empty` ones) that fit no form, or not the one that was `asked` for."""
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
