"""A language model as judge: a rubric, fenced answers, a verdict that is one of three exact lines."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_kit.config.settings import LLMJudge
from dpo_kit.errors import ConfigError, JudgeError
from dpo_kit.judge.server import Reply, Request, Server
from dpo_kit.judge.verdicts import Judge, Raw, Shown
from dpo_kit.model.chats import conversation_text
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.redact import redact_text

PROTOCOL = Path(__file__).with_name("protocol.txt").read_text(encoding="utf-8")
LEAST = 4  # replies without a verdict from which on a judge is given up
_VERDICT = re.compile(r"VERDICT: (1|2|TIE)")
RAW: dict[str, Raw] = {"1": "first", "2": "second", "TIE": "tie"}


class LanguageModelJudge(Judge):
    """A model behind an OpenAI-compatible server that compares answers by the rubric in a text file."""

    def __init__(self, settings: LLMJudge, journal: Journal) -> None:
        self.name = f"llm {settings.model}"
        self.settings = settings
        self.instructions = read_rubric(settings.rubric).strip() + "\n" + PROTOCOL
        self.server = Server(settings, journal)

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        """JudgeError where most replies hold no verdict: as ties they would look like a result."""
        settings, requests = self.settings, []
        for each in shown:
            key = key_of("llm", settings.model, self.instructions, settings.temperature, settings.max_tokens, each)
            text = f"{self.instructions}\n{fence(each, secrets.token_hex(8))}"
            # one user message: some chat templates refuse the system role
            message = {"role": "user", "content": text}
            requests.append(Request(key, [message], settings.max_tokens, settings.temperature))
        replies = self.server.ask(requests, "verdicts")
        verdicts = [read_verdict(reply) for reply in replies]
        unread = [reply for reply, raw in zip(replies, verdicts, strict=True) if reply and raw == "unparsable"]
        if len(unread) >= LEAST and 2 * len(unread) > len(replies):
            cut = sum(reply.cut for reply in unread)
            raise JudgeError(
                f"{self.name} keeps to no form of verdict: {len(unread)} of {len(replies)} replies do not end in "
                f"VERDICT: 1, VERDICT: 2 or VERDICT: TIE ({cut} were cut at judge.max_tokens={settings.max_tokens}), "
                f"such as {redact_text(unread[0].text)[-200:]!r}. Raise judge.max_tokens, or take another judge.model"
            )
        return verdicts

    def spend(self) -> dict[str, Any]:
        return self.server.spend()


def read_rubric(path: str) -> str:
    """The text of the rubric file. ConfigError where it is not there or empty."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"judge.rubric={path} cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"judge.rubric={path} is empty: write down what makes an answer the better one")
    return text


def fence(shown: Shown, nonce: str) -> str:
    """What the judge is shown: message and answers, each between fences that no answer can forge."""
    parts = {"message": conversation_text(shown.prompt), "answer 1": shown.first, "answer 2": shown.second}
    return fence_parts(parts, nonce)


def fence_parts(parts: Mapping[str, str], nonce: str) -> str:
    """Each of the named texts between fences that carry `nonce`, which is to be drawn anew for each request."""
    return "\n\n".join(f"<<<{name} {nonce}>>>\n{text}\n<<<end of {name} {nonce}>>>" for name, text in parts.items())


def read_verdict(reply: Reply | None) -> Raw:
    """The verdict on the last line that is not blank; a line that is anything else is unparsable."""
    if reply is None:
        return "unjudged"
    found = _VERDICT.fullmatch(last_line(reply.text))
    return RAW[found[1]] if found else "unparsable"


def last_line(text: str) -> str:
    """The last line of `text` that is not blank; "" where there is none."""
    return next(reversed(text.strip().splitlines()), "").strip()
