"""One row in its normal form, or the reason why it cannot have one.

pairs: prompt, chosen, rejected; unary: prompt, completion, label; prompts: prompt alone. Prompt and answers are text,
or chat messages.
"""

from __future__ import annotations

import datetime
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from dpo_kit.data.context import context_fault
from dpo_kit.data.read import Fault, Row
from dpo_kit.model.chats import message_text
from dpo_kit.run.files import digest

Kind = Literal["pairs", "unary", "prompts"]
ANSWERS: dict[Kind, tuple[str, ...]] = {"pairs": ("chosen", "rejected"), "unary": ("completion",), "prompts": ()}
ROLES = ("system", "developer", "user", "assistant", "tool")
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # characters that show nothing and that strip() leaves
LEAST_ECHO = 3  # words; a shorter prompt may well stand at the beginning of an honest answer
TRANSCRIPT = "\n\nHuman:"
Found = tuple[str, str, str]  # reason, what was found, what to do


def normalise(row: Row, kind: Kind) -> Row | Fault:
    """`row` with an explicit prompt, every text checked."""
    values = dict(row.values)
    if not row.typed and str(values.get("label")).lower() in ("true", "false"):
        values["label"] = values["label"].lower() == "true"
    needed = ANSWERS[kind] + {"pairs": (), "unary": ("prompt", "label"), "prompts": ("prompt",)}[kind]
    fault = missing_fault(values, needed) or _answer_fault(values, kind)
    if fault is None and values.get("prompt") is None:
        fault = _whole_fault(values)
        values |= {} if fault else _implicit_prompt(values)
    fault = fault or text_fault("prompt", values["prompt"]) or _answer_fault(values, kind)
    fault = fault or _mixed_fault(values, kind) or _echo_fault(values, kind) or _label_fault(values, kind)
    fault = fault or question_fault(values["prompt"]) or _turns_fault(values, kind) or context_fault(values)
    return Fault(row.place, *fault) if fault else Row(row.place, values)


def missing_fault(values: dict[str, Any], needed: tuple[str, ...]) -> Found | None:
    """Why a row lacks one of the columns `needed`; None where it has them all."""
    missing = next((name for name in needed if values.get(name) is None), None)
    if missing is None:
        return None
    near = [] if missing in values else difflib.get_close_matches(missing, values.keys() - set(needed), n=1)
    remedy = f"did you mean {near[0]}?" if near else "fill it in, or leave the row out"
    return f"column {missing!r} is missing or null", f"columns {', '.join(values)}", remedy


def _answer_fault(values: dict[str, Any], kind: Kind) -> Found | None:
    for name in ANSWERS[kind]:
        if fault := text_fault(name, values[name]):
            return fault
        last = values[name] if isinstance(values[name], str) else values[name][-1]
        if not isinstance(last, str) and last["role"] != "assistant":
            return f"{name} does not end with the assistant", last["role"], "its last message must be the answer"
    return None


def text_fault(name: str, value: Any) -> Found | None:
    """Why `value` is neither text nor a list of messages with something in it."""
    if isinstance(value, str):
        return (f"{name} is empty", repr(value[:20]), "leave the row out") if is_blank(value) else None
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        remedy = "text that looks like a date was turned into one: write the column as text (JSONL keeps it)"
        return f"{name} is a timestamp, not text", f"{type(value).__name__} {value}", remedy
    if not isinstance(value, list) or not value:
        found = f"{type(value).__name__} {str(value)[:40]}"
        return f"{name} is neither text nor a list of messages", found, "write text, or [{role: …, content: …}]"
    for message in value:
        if not isinstance(message, dict) or not (isinstance(message.get("content"), str) or _only_calls(message)):
            return f"{name} has a message without text content", str(message)[:60], "write content as text"
        if message.get("role") not in ROLES:
            return f"{name} has an unknown role", repr(message.get("role"))[:40], f"known are {', '.join(ROLES)}"
    text = message_text(value[-1])
    return (f"{name} is empty", repr(text[:20]), "leave the row out") if is_blank(text) else None


def _only_calls(message: dict[str, Any]) -> bool:
    """An assistant that calls tools needs to say nothing beside (OpenAI's `content: null`)."""
    calls = message.get("tool_calls")
    are_calls = isinstance(calls, list) and bool(calls) and all(isinstance(call, dict) for call in calls)
    return message.get("role") == "assistant" and message.get("content") is None and are_calls


def is_blank(text: str) -> bool:
    return not text.strip() or not text.strip(INVISIBLE).strip()


def _mixed_fault(values: dict[str, Any], kind: Kind) -> Found | None:
    kinds = {name: isinstance(values[name], str) for name in ("prompt", *ANSWERS[kind])}
    if len(set(kinds.values())) == 1:
        return None
    found = ", ".join(f"{name}: {'text' if is_text else 'chat'}" for name, is_text in kinds.items())
    return "text and chat messages are mixed", found, "write both answers as text, or both as messages"


def _echo_fault(values: dict[str, Any], kind: Kind) -> Found | None:
    """A prompt that stands in the answer again would be trained on as if it were answered."""
    prompt = values["prompt"]
    if isinstance(prompt, str):
        prompt = prompt.strip()
        echoed = (name for name in ANSWERS[kind] if values[name].lstrip().startswith(prompt))
        name = next(echoed, None) if len(prompt.split(None, LEAST_ECHO)) >= LEAST_ECHO else None
    else:
        name = next((name for name in ANSWERS[kind] if values[name][: len(prompt)] == prompt), None)
    if name is None:
        return None
    remedy = "cut it off the answer, or leave out the column prompt where all answers have it"
    return f"{name} repeats the prompt", repr(str(prompt)[:40]), remedy


def _whole_fault(values: dict[str, Any]) -> Found | None:
    """Why no prompt can be read off the common beginning of two whole conversations."""
    chosen, rejected = values["chosen"], values["rejected"]
    if type(chosen) is not type(rejected):
        return "text and chat messages are mixed", "in chosen and rejected", "both must be one of the two"
    if isinstance(chosen, str) and TRANSCRIPT in chosen:
        remedy = "data.form=hh_rlhf takes it apart"
        return "chosen is a whole transcript", repr(chosen[:30]), remedy
    if chosen[0] != rejected[0]:
        return "column 'prompt' is missing or null", "chosen and rejected begin differently", "add the prompt"
    if isinstance(chosen, str):
        found = f"two texts that both begin with {chosen[:20]!r}"  # where the prompt ends, no character says
        return "column 'prompt' is missing or null", found, "add the prompt, and cut it off both answers"
    if chosen != rejected and (chosen == rejected[: len(chosen)] or rejected == chosen[: len(rejected)]):
        shorter, longer = sorted((len(chosen), len(rejected)))
        return "one answer is the beginning of the other", f"{shorter} and {longer} messages", "add the prompt"
    return None


def _label_fault(values: dict[str, Any], kind: Kind) -> Found | None:
    if kind != "unary" or isinstance(values["label"], bool):
        return None
    remedy = "write true or false; every other value would count as true"
    return "label is not true or false", repr(values["label"])[:40], remedy


def question_fault(prompt: Any) -> Found | None:
    """Why there is nothing to answer. TRL's trainers differ on a turn that the assistant has begun: its ORPO and CPO go
    on with it, the others close it and open a second one.
    """
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return None
    remedy = "set what the assistant has begun at the beginning of the answers, or end with a message to answer"
    return "prompt ends with the assistant", repr(message_text(prompt[-1])[:40]), remedy


def _turns_fault(values: dict[str, Any], kind: Kind) -> Found | None:
    """What users and systems say inside an answer would be trained on as if the model had said it."""
    for name in ANSWERS[kind]:
        for message in values[name] if isinstance(values[name], list) else ():
            if message["role"] not in ("assistant", "tool"):
                remedy = "cut both conversations where they part, or give each answer a row with its own prompt"
                return f"{name} holds a turn of the {message['role']}", repr(message_text(message)[:40]), remedy
    return None


def _implicit_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """The common beginning of two chats as the prompt, as TRL takes it."""
    chosen, rejected = values["chosen"], values["rejected"]
    parted = (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    at = next(parted, len(chosen) - 1)
    return {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def as_chat(values: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """A text row as one user turn and one assistant turn; a chat row unchanged."""
    if not isinstance(values["prompt"], str):
        return values
    answers = {name: [{"role": "assistant", "content": values[name]}] for name in ANSWERS[kind]}
    return values | {"prompt": [{"role": "user", "content": values["prompt"]}]} | answers


def identify(rows: Iterable[dict[str, Any]], kind: Kind) -> Iterator[dict[str, Any]]:
    """Add `pair_id`: a hash of the content, with a count where content repeats."""
    seen: Counter[str] = Counter()
    for values in rows:
        content = digest([values["prompt"], *(values[name] for name in ANSWERS[kind])])
        seen[content] += 1
        pair_id = content if seen[content] == 1 else f"{content}-{seen[content]}"
        yield values | {"pair_id": pair_id}
