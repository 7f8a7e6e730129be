"""A chat in any of the spellings in which data sets have it, as the list of messages that TRL and templates read."""

import ast
import json
import warnings
from contextlib import suppress
from typing import Any

from dpo_kit.data.read import UnfitError, lone_surrogate
from dpo_kit.data.rows import ROLES, is_plain

SPELLINGS = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
    **{role: role for role in ROLES},
}
CALLS = ("function_call", "tool_call")  # roles of a message whose text is a call
TEXT_PARTS = ("text", "input_text", "output_text")
LONGEST = 1_000_000  # characters of a value that is written as text
LEAVE = "leave the row out"
Chat = list[dict[str, Any]]


def read_chat(name: str, value: Any) -> Any:
    """`value` as messages where it is a message or a list of them; anything else as it is. Raises UnfitError."""
    if isinstance(value, dict) and value.keys() & {"role", "from"}:
        value = [value]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return value
    chat: Chat = []
    for message in value:
        made = _message(name, message)
        if "tool_calls" in made and chat and chat[-1].get("tool_calls") and _role(message) in CALLS:
            chat[-1]["tool_calls"] += made["tool_calls"]  # calls at the same time, each written as a message
        else:
            chat.append(made)
    return chat


def conversation(name: str, value: Any) -> Chat:
    """`value`, or what its text says, as messages. Raises UnfitError where it is no chat."""
    chat = read_chat(name, unwritten(name, value))
    if not isinstance(chat, list) or not chat or not all(isinstance(message, dict) for message in chat):
        raise UnfitError(f"{name} is no list of messages", f"{type(value).__name__} {str(value)[:30]}", LEAVE)
    return chat


def unwritten(name: str, value: Any) -> Any:
    """The list or object that text writes down, in JSON or Python; other values as they are. UnfitError: neither."""
    if not isinstance(value, str):
        return value
    if len(value) <= LONGEST and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            try:
                literal = json.loads(value)
            except (ValueError, RecursionError):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SyntaxWarning)
                    literal = json.loads(json.dumps(ast.literal_eval(value.strip())))
            if isinstance(literal, list | dict) and not lone_surrogate(literal):
                return literal
    remedy = "write it as JSON (json.dumps), or the file as JSONL or Parquet"
    raise UnfitError(f"{name} is text that holds no list or object", repr(value[:40]), remedy)


def _role(message: dict[str, Any]) -> str:
    return str(message.get("role") or message.get("from")).strip().lower()


def _message(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """`message` with the keys role and content, whatever they were called, and its others."""
    if is_plain(message):
        return message
    role, content = _role(message), message.get("content")
    if content is None:
        content = message.get("value")
    others = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
    try:
        json.dumps(others)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"{name} has a message with a value that is no JSON"
        raise UnfitError(reason, str(error)[:60], "write it as text") from error
    if role in CALLS:
        return others | {"role": "assistant", "content": "", "tool_calls": _calls(name, content)}
    if others.get("tool_calls"):
        others["tool_calls"] = _calls(name, others["tool_calls"])
    elif isinstance(others.get("function_call"), dict):  # how OpenAI wrote a call before tool_calls
        others["tool_calls"], content = _calls(name, others.pop("function_call")), content or ""
    spelt = message.get("role") or message.get("from")
    return {"role": SPELLINGS.get(role, spelt), "content": _text(name, content)} | others


def _calls(name: str, value: Any) -> Chat:
    """What one message calls, as tool_calls: calls, or {name, arguments}, alone or in a list, or the text of that."""

    def has_name(call: Any) -> bool:
        function = call.get("function") if isinstance(call, dict) else None
        return isinstance(function, dict) and isinstance(function.get("name"), str)

    given = unwritten(name, value)
    listed = given if isinstance(given, list) else [given]
    calls = [call if has_name(call) else {"type": "function", "function": call} for call in listed]
    if not calls or not all(map(has_name, calls)):
        raise UnfitError(f"{name} has a call without a name", str(value)[:40], 'a call is {"name": …, "arguments": …}')
    return calls


def _text(name: str, content: Any) -> Any:
    """The text of content that is a list of parts; other content as it is."""
    if isinstance(content, dict) and isinstance(content.get("text"), str):
        content = [content]
    if not isinstance(content, list):
        return content
    for part in content:
        if isinstance(part, dict) and (kind := part.get("type", "text")) not in TEXT_PARTS:
            raise UnfitError(f"{name} has a part that is no text", str(kind)[:40], f"only text trains here: {LEAVE}")
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content
