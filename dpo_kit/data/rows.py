"""One row in its normal form, or the reason why it cannot have one.

pairs: prompt, chosen, rejected; unary: prompt, completion, label; prompts: prompt alone. Prompt and answers are text,
or chat messages; columns that belong to the prompt may stand beside it.
"""

import datetime
import difflib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from dpo_kit.data.read import Fault, Row, UnfitError
from dpo_kit.model.chats import CONTEXT, message_text
from dpo_kit.run.files import digest

Kind = Literal["pairs", "unary", "prompts"]
Rows = list[dict[str, Any]]
ANSWERS: dict[Kind, tuple[str, ...]] = {"pairs": ("chosen", "rejected"), "unary": ("completion",), "prompts": ()}
ROLES = ("system", "developer", "user", "assistant", "tool")
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # characters that show nothing and that strip() leaves
LEAST_ECHO = 3  # words; a shorter prompt may well stand at the beginning of an honest answer
MIXED, NO_PROMPT = "text and chat messages are mixed", "column 'prompt' is missing or null"
BESIDE = ("system", *CONTEXT)
"""Columns that go into a chat beside prompt and answers; raw text has no place for them."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TAKEN = ("tools", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
         "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
         "return_assistant_tokens_mask", "tokenizer_kwargs")  # fmt: skip
"""Parameters of apply_chat_template that are no variables of a template."""


def normalise(row: Row, kind: Kind) -> Row | Fault:
    """`row` with an explicit prompt, every text checked."""
    values = dict(row.values)
    if not row.typed and str(values.get("label")).lower() in ("true", "false"):
        values["label"] = values["label"].lower() == "true"
    needed = ANSWERS[kind] + {"pairs": (), "unary": ("prompt", "label"), "prompts": ("prompt",)}[kind]
    try:
        refuse_missing(values, needed)
        for name in ANSWERS[kind]:
            _refuse_text(name, values[name])
            if isinstance(values[name], list) and (role := values[name][-1]["role"]) != "assistant":
                remedy = "its last message must be the answer"
                raise UnfitError(f"{name} does not end with the assistant", role, remedy)
        if values.get("prompt") is None:
            values |= _common_prompt(values["chosen"], values["rejected"])
        _refuse_text("prompt", values["prompt"])
        are_texts = {name: isinstance(values[name], str) for name in ("prompt", *ANSWERS[kind])}
        if len(set(are_texts.values())) > 1:
            forms = ", ".join(f"{name}: {'text' if is_text else 'chat'}" for name, is_text in are_texts.items())
            raise UnfitError(MIXED, forms, "write both answers as text, or both as messages")
        _refuse_echo(values, kind)
        if kind == "unary" and not isinstance(values["label"], bool):
            remedy = "write true or false; every other value would count as true"
            raise UnfitError("label is not true or false", repr(values["label"])[:40], remedy)
        _refuse_turns(values, kind)
        _refuse_beside(values)
    except UnfitError as unfit:
        return unfit.at(row.place)
    return Row(row.place, values)


def refuse_missing(values: dict[str, Any], needed: tuple[str, ...]) -> None:
    """UnfitError where a row lacks one of the columns `needed`."""
    missing = next((name for name in needed if values.get(name) is None), None)
    if missing is not None:
        near = [] if missing in values else difflib.get_close_matches(missing, values.keys() - set(needed), n=1)
        remedy = f"did you mean {near[0]}?" if near else "fill it in, or leave the row out"
        raise UnfitError(f"column {missing!r} is missing or null", f"columns {', '.join(values)}", remedy)


def _refuse_text(name: str, value: Any) -> None:
    """UnfitError where `value` is neither text nor a list of messages with something in it."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        remedy = "text that looks like a date was turned into one: write the column as text (JSONL keeps it)"
        raise UnfitError(f"{name} is a timestamp, not text", f"{type(value).__name__} {value}", remedy)
    if not isinstance(value, str) and (not isinstance(value, list) or not value):
        got, remedy = f"{type(value).__name__} {str(value)[:40]}", "write text, or [{role: …, content: …}]"
        raise UnfitError(f"{name} is neither text nor a list of messages", got, remedy)
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict) or not (isinstance(message.get("content"), str) or _only_calls(message)):
            raise UnfitError(f"{name} has a message without text content", str(message)[:60], "write content as text")
        if message.get("role") not in ROLES:
            known = f"known are {', '.join(ROLES)}"
            raise UnfitError(f"{name} has an unknown role", repr(message.get("role"))[:40], known)
    text = value if isinstance(value, str) else message_text(value[-1])
    if is_blank(text):
        raise UnfitError(f"{name} is empty", repr(text[:20]), "leave the row out")


def _only_calls(message: dict[str, Any]) -> bool:
    """An assistant that calls tools needs to say nothing beside (OpenAI's `content: null`)."""
    calls = message.get("tool_calls")
    are_calls = isinstance(calls, list) and bool(calls) and all(isinstance(call, dict) for call in calls)
    return message.get("role") == "assistant" and message.get("content") is None and are_calls


def is_plain(message: Any) -> bool:
    """Whether a message is as templates read it: role and content, nothing beside."""
    are_both = isinstance(message, dict) and message.keys() == {"role", "content"}
    return are_both and message["role"] in ROLES and isinstance(message["content"], str)


def is_blank(text: str) -> bool:
    return not text.strip() or not text.strip(INVISIBLE).strip()


def _common_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
    """The common beginning of two whole conversations as the prompt, as TRL takes it."""
    if type(chosen) is not type(rejected):
        raise UnfitError(MIXED, "in chosen and rejected", "both must be one of the two")
    if isinstance(chosen, str) and "\n\nHuman:" in chosen:
        raise UnfitError("chosen is a whole transcript", repr(chosen[:30]), "data.form=hh_rlhf takes it apart")
    if chosen[0] != rejected[0]:
        raise UnfitError(NO_PROMPT, "chosen and rejected begin differently", "add the prompt")
    if isinstance(chosen, str):  # where the prompt ends, no character says
        beginning = f"two texts that both begin with {chosen[:20]!r}"
        raise UnfitError(NO_PROMPT, beginning, "add the prompt, and cut it off both answers")
    if chosen != rejected and (chosen == rejected[: len(chosen)] or rejected == chosen[: len(rejected)]):
        shorter, longer = sorted((len(chosen), len(rejected)))
        counts = f"{shorter} and {longer} messages"
        raise UnfitError("one answer is the beginning of the other", counts, "add the prompt")
    parted = (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    at = next(parted, len(chosen) - 1)
    return {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def _refuse_echo(values: dict[str, Any], kind: Kind) -> None:
    """A prompt that stands in the answer again would be trained on as if it were answered."""
    prompt, answers = values["prompt"], {name: values[name] for name in ANSWERS[kind]}
    if isinstance(prompt, str):
        prompt = prompt.strip()
        is_long = len(prompt.split(None, LEAST_ECHO)) >= LEAST_ECHO
        echoes = [name for name, text in answers.items() if is_long and text.lstrip().startswith(prompt)]
    else:
        echoes = [name for name, chat in answers.items() if chat[: len(prompt)] == prompt]
    if echoes:
        remedy = "cut it off the answer, or leave out the column prompt where all answers have it"
        raise UnfitError(f"{echoes[0]} repeats the prompt", repr(str(prompt)[:40]), remedy)


def _refuse_turns(values: dict[str, Any], kind: Kind) -> None:
    """UnfitError where there is nothing to answer (TRL's trainers differ on a turn that the assistant has begun: its
    ORPO and CPO go on with it, the others close it and open a second one), or where an answer holds what users and
    systems say, which would be trained on as if the model had said it.
    """
    if isinstance(values["prompt"], str):
        return
    if (last := values["prompt"][-1])["role"] == "assistant":
        remedy = "set what the assistant has begun at the beginning of the answers, or end with a message to answer"
        raise UnfitError("prompt ends with the assistant", repr(message_text(last)[:40]), remedy)
    for name, message in [(answer, message) for answer in ANSWERS[kind] for message in values[answer]]:
        if message["role"] not in ("assistant", "tool"):
            remedy = "cut both conversations where they part, or give each answer a row with its own prompt"
            reason = f"{name} holds a turn of the {message['role']}"
            raise UnfitError(reason, repr(message_text(message)[:40]), remedy)


def _refuse_beside(row: dict[str, Any]) -> None:
    """UnfitError where the columns beside prompt and answers cannot be trained on."""
    if media := next((name for name in MEDIA if row.get(name)), None):
        remedy = "only text is trained: leave the row out, or take the column away where the text does without it"
        raise UnfitError(f"{media} cannot be trained on", str(row[media])[:40], remedy)
    system, first = row.get("system") or "", row["prompt"][0]
    if not isinstance(system, str):
        raise UnfitError("system is not text", str(system)[:40], "write it as text")
    if system and isinstance(first, dict) and first["role"] == "system" and first["content"] != system:
        where = "in the column system and in the prompt"
        raise UnfitError("there are two system turns", where, "leave one of them out")
    read_context(row)


def read_context(row: dict[str, Any]) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs` of a row, from values or JSON text, where it has them. Raises UnfitError."""

    def unfit(amiss: str) -> UnfitError:
        return UnfitError(amiss, str([row[name] for name in CONTEXT if row.get(name)])[:60], "write it as TRL takes it")

    context: dict[str, Any] = {name: row[name] for name in CONTEXT if row.get(name) not in (None, "")}
    for name, given in context.items():
        try:
            context[name] = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise unfit(f"{name} is text that is no JSON ({error})") from error
    tools, kwargs = context.get("tools") or [], context.get("chat_template_kwargs") or {}
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise unfit("tools is no list of functions")
    if not isinstance(kwargs, dict):
        raise unfit("chat_template_kwargs is no object of names and values")
    if taken := sorted(kwargs.keys() & {*TAKEN}):
        raise unfit(f"chat_template_kwargs has {taken[0]}, which is no variable of a template")
    return {name: value for name, value in context.items() if value is not None}


def identify(rows: Rows, kind: Kind) -> Iterator[dict[str, Any]]:
    """Add `pair_id`: a hash of the content, with a count where content repeats."""
    seen: Counter[str] = Counter()
    for values in rows:
        content = digest([values["prompt"], *(values[name] for name in ANSWERS[kind])])
        seen[content] += 1
        yield values | {"pair_id": content if seen[content] == 1 else f"{content}-{seen[content]}"}
