"""Chat templates are programs from elsewhere: each is tried on chats to come, in a process with limits.

Jinja's sandbox keeps a template from files and code, not from loops without end or texts without bound, and neither can
be stopped from inside a thread. So chats are rendered once beforehand in a process of their own (dpo_kit.model.render),
without this one's environment, each in `SECONDS` of its processor's time. What passed is remembered under
`DPO_KIT_CACHE`, by template and chats. A template that writes the date gets one date for a whole run.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_kit.errors import ModelError
from dpo_kit.model.chats import Messages, split_context
from dpo_kit.run.files import cache_folder, write_text

SECONDS = 2.0  # of processor time for one chat; ordinary templates take less than a millisecond
MEMORY = 2**29  # bytes beside those of the process itself
SIZE = 2**18  # characters beside 16 times those of the messages
STARTING = 60.0  # seconds for the process to start, on a busy machine
KEPT = ("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
OFFLINE = {"HF_HUB_OFFLINE": "1", "USE_TORCH": "0", "OPENBLAS_NUM_THREADS": "1"}
CLOCK = "strftime_now"
Chat = tuple[Messages, bool]


def template_hash(tokenizer: Any) -> str | None:
    """sha256 of the chat template, as the manifest records it; None without one."""
    return _hash(tokenizer.get_chat_template()) if tokenizer.chat_template else None


def writes_date(tokenizer: Any) -> bool:
    """Whether a template of `tokenizer` writes the day, or the hour, on which it is rendered."""
    return any(CLOCK in text for text in _templates(tokenizer))


def stop_clock(tokenizer: Any, moment: datetime) -> None:
    """From now on it is `moment` for the templates of `tokenizer`: what a run trains on, measures and resumes with has
    one date. transformers hands its compiled template the clock as a global, which no argument can replace.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for text in _templates(tokenizer):
        if CLOCK in text:
            _compile_jinja_template(text).globals[CLOCK] = moment.strftime


def refuse_hostile_template(tokenizer: Any, chats: Iterable[Chat]) -> None:
    """ModelError where the template takes too long, too much memory or too many characters over any of `chats`
    (messages with their context, and whether a generation prompt follows).
    """
    by_template: dict[str, list[Any]] = {}
    for chat, prompting in chats if tokenizer.chat_template else ():
        messages, context = split_context(chat)
        tools = context.get("tools")
        options = {"tools": tools, "add_generation_prompt": prompting, **context.get("chat_template_kwargs", {})}
        by_template.setdefault(tokenizer.get_chat_template(tools=tools), []).append([messages, options])
    for template, asked in by_template.items():
        tried = {"template": template, "tokens": tokenizer.special_tokens_map, "chats": asked}
        limits = {"seconds": SECONDS, "memory": MEMORY, "size": SIZE}
        known = cache_folder("templates") / _hash(json.dumps([tried, limits, version("transformers")], default=str))
        if known.exists():
            continue
        if fault := _try(tried | limits):
            raise ModelError(
                f"the chat template (sha256 {_hash(template)}) {fault}: it is not used. Take the template of the "
                "model's maker, or leave the row out if it alone is strange"
            )
        write_text(known, "")


def _templates(tokenizer: Any) -> list[str]:
    given = tokenizer.chat_template or []
    return list(given.values()) if isinstance(given, dict) else [given] if isinstance(given, str) else given


def _try(given: dict[str, Any]) -> str | None:
    """What the process that renders has to say; None where all is well."""
    patience = STARTING + SECONDS * 2 + 0.05 * len(given["chats"])
    asked, count = json.dumps(given, default=str), len(given["chats"])
    command = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
    env = {name: os.environ[name] for name in KEPT if name in os.environ} | OFFLINE
    try:
        ran = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=patience, env=env)
    except subprocess.TimeoutExpired:
        return f"did not render {count} chats in {patience:.0f} s"
    said = ran.stdout
    done = said.count(".") if ran.returncode else len(said) - len(said.lstrip("."))
    place = f"(chat {done + 1} of {count})"
    if ran.returncode == -signal.SIGPROF:
        return f"takes more than {SECONDS:g} s over one chat {place}"
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["killed"])[-1]
        return f"ends the process that renders it: {last} {place}"
    return f"{said[done:]} {place}" if said[done:] else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
