"""What is said: prompts and answers, each as text or as chat messages, and how a judge or a person reads them.

What belongs to a chat beside its messages (TRL's columns `tools` and `chat_template_kwargs`) stands in its first
message beside role and content, so that it goes wherever the prompt goes: into samples, KL, judges, journals, pairs.
`split_context` takes it out again where the chat is rendered.
"""

import json
import re
from typing import Any

Messages = list[dict[str, Any]]
Prompt = str | Messages
CONTEXT = ("tools", "chat_template_kwargs")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")  # of HH-RLHF's transcripts
ROLES = {"Human": "user", "Assistant": "assistant"}


def with_context(prompt: Prompt, context: dict[str, Any]) -> Prompt:
    """A chat prompt with `context` in its first message; text, which no template renders, as it is."""
    return prompt if isinstance(prompt, str) or not context else [prompt[0] | context, *prompt[1:]]


def split_context(messages: Any) -> tuple[Any, dict[str, Any]]:
    """The messages alone, and what of `CONTEXT` the first one carries; text carries nothing."""
    if isinstance(messages, str):
        return messages, {}
    if not (context := {name: messages[0][name] for name in CONTEXT if messages[0].get(name) is not None}):
        return messages, {}
    return [{key: value for key, value in messages[0].items() if key not in CONTEXT}, *messages[1:]], context


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of a row as TRL's trainers take it: with the columns that belong to it."""
    return with_context(row["prompt"], {name: row[name] for name in CONTEXT if row.get(name) is not None})


def as_messages(prompt: Prompt) -> Messages:
    """A prompt as chat messages: text is one user turn, unless it is a transcript that waits for its answer."""
    return (open_turns(prompt) or [{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt


def open_turns(text: str) -> Messages:
    """The turns of a transcript `Human: … Assistant:` before its last, empty one; none of any other text."""
    before, *parts = TURN.split(text.lstrip())
    if before or parts[:1] != ["Human"] or parts[-2:-1] != ["Assistant"] or parts[-1].strip():
        return []
    turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)
    return [{"role": ROLES[who], "content": said.strip()} for who, said in turns]


def text_of(said: Prompt) -> str:
    """The text of a prompt or an answer, a chat's messages one below the other."""
    return said if isinstance(said, str) else "\n".join(map(message_text, said))


def answer_text(answer: Prompt) -> str:
    """What an answer ends with, as a judge reads it."""
    return answer if isinstance(answer, str) else message_text(answer[-1])


def message_text(message: dict[str, Any]) -> str:
    """The content of a message, and the calls that it makes as lines of JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([message["content"]] if message.get("content") else []), *calls])


def conversation_text(prompt: Prompt) -> str:
    """A prompt as one text: a single message as it is, several ones each under its role, tools before them."""
    if isinstance(prompt, str):
        return prompt
    messages, context = split_context(prompt)
    turns = [(message["role"], message_text(message)) for message in messages]
    if tools := context.get("tools"):
        turns.insert(0, ("tools", "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)))
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)
