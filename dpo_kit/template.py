"""Chat templates are programs from elsewhere: each is tried on chats to come, in a process with limits.

Jinja's sandbox keeps a template from files and code, not from loops without end or texts without bound, and neither can
be stopped from inside a thread. So chats are rendered once beforehand in a process of their own (dpo_kit.render),
without this one's environment, each in `SECONDS` of its processor's time. What passed is remembered under
`DPO_KIT_CACHE`, by template and chats.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_kit.errors import ModelError
from dpo_kit.run import cache_folder, write_text

SECONDS = 2.0  # of processor time for one chat; ordinary templates take less than a millisecond
MEMORY = 2**29  # bytes beside those of the process itself
SIZE = 2**18  # characters beside 16 times those of the messages
STARTING = 60.0  # seconds for the process to start, on a busy machine
KEPT = ("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
OFFLINE = {"HF_HUB_OFFLINE": "1", "USE_TORCH": "0", "OPENBLAS_NUM_THREADS": "1"}
Chat = tuple[list[dict[str, Any]], bool]


def template_hash(tokenizer: Any) -> str | None:
    """sha256 of the chat template, as the manifest records it; None without one."""
    return _hash(tokenizer.get_chat_template()) if tokenizer.chat_template else None


def refuse_hostile_template(tokenizer: Any, chats: Iterable[Chat]) -> None:
    """ModelError where the template takes too long, too much memory or too many characters over any of `chats`
    (messages, and whether a generation prompt follows).
    """
    if not tokenizer.chat_template:
        return
    tried = {"template": tokenizer.get_chat_template(), "tokens": tokenizer.special_tokens_map, "chats": list(chats)}
    limits = {"seconds": SECONDS, "memory": MEMORY, "size": SIZE}
    known = cache_folder("templates") / _hash(json.dumps([tried, limits, version("transformers")], default=str))
    if known.exists() or not tried["chats"]:
        return
    if fault := _try(tried | limits):
        raise ModelError(
            f"the chat template (sha256 {template_hash(tokenizer)}) {fault}: it is not used. Take the template of the "
            "model's maker, or leave the row out if it alone is strange"
        )
    write_text(known, "")


def _try(given: dict[str, Any]) -> str | None:
    """What the process that renders has to say; None where all is well."""
    patience = STARTING + SECONDS * 2 + 0.05 * len(given["chats"])
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("render.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: os.environ[name] for name in KEPT if name in os.environ} | OFFLINE,
    )
    with process:
        try:
            said, errors = process.communicate(json.dumps(given, default=str), timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"did not render {len(given['chats'])} chats in {patience:.0f} s"
    done = said.count(".") if process.returncode else len(said) - len(said.lstrip("."))
    place = f"(chat {done + 1} of {len(given['chats'])})"
    if process.returncode == -signal.SIGPROF:
        return f"takes more than {SECONDS:g} s over one chat {place}"
    if process.returncode:
        last = (errors.strip().splitlines() or ["killed"])[-1]
        return f"ends the process that renders it: {last} {place}"
    return f"{said[done:]} {place}" if said[done:] else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
