"""Models behind an OpenAI-compatible server (vLLM, Ollama, `transformers serve`, a provider): asked by several threads,
each reply kept the moment it comes, never above what it may cost.

The official client does the asking and the retrying; the key comes from an environment variable and goes nowhere else.
"""

import json
import logging
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dpo_kit.config.limits import missing_package
from dpo_kit.config.settings import Endpoint
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.chats import conversation_text, message_text, with_context
from dpo_kit.run.journal import Journal
from dpo_kit.run.quiet import bar
from dpo_kit.run.redact import redact_text

log = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 3  # at least, in most languages: what a request may cost is known before its reply
CONNECT_SECONDS = 0.5
FAILURES_IN_A_ROW = 5  # requests that fail until the rest is left for the next start
LONGEST_PAUSE = 8.0  # seconds before a reply that made no sense is asked for again


@dataclass(frozen=True)
class Request:
    """One question to a model; replies are kept under `key`, so that equal keys are asked once."""

    key: str
    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float | None  # None: as the server has it
    seed: int | None = None
    context: dict[str, Any] = field(default_factory=dict)  # tools and chat_template_kwargs (see chats.py)
    top_p: float | None = None


@dataclass(frozen=True)
class Reply:
    """What the model said; `cut` where the token limit ended it."""

    text: str
    cut: bool


class GarbageError(Exception):
    """The server says that all is well, but sends no completion."""


class Server:
    """One model of one server, its replies in `journal`. ConfigError where the client or the key is missing."""

    def __init__(self, endpoint: Endpoint, journal: Journal) -> None:
        if fault := missing_package("a model behind a server", "openai"):
            raise ConfigError(fault)
        import openai

        key, retries, timeout = _read_key(endpoint), endpoint.retries, endpoint.timeout_s
        self.client = openai.OpenAI(base_url=endpoint.base_url, api_key=key, max_retries=retries, timeout=timeout)
        self.endpoint, self.journal = endpoint, journal
        self.failures: Counter[str] = Counter()
        self.retried = 0
        self._requests, self._cost = len(self._kept()), sum(row["cost"] for row in self._kept())
        self._under_way: list[float] = []  # what each request that is out may cost
        self._in_a_row, self._stopped = 0, ""
        self._guard = threading.Condition()

    def ask(self, requests: Sequence[Request], description: str) -> list[Reply | None]:
        """A reply per request, in their order; None where there is none (the reason is in `spend()`). Only what the
        journal has not is asked. ModelError where the server refuses the key or does not know the model.
        """
        missing = {request.key: request for request in requests if request.key not in self.journal.rows}
        pool = ThreadPoolExecutor(self.endpoint.workers)
        try:
            asked = [pool.submit(self._try, request) for request in missing.values()]
            with bar(len(asked), description, "request") as progress:
                for done in as_completed(asked):
                    done.result()
                    progress.set_postfix_str(f"cost {self._cost:.4g}" if self._cost else "", refresh=False)
                    progress.update()
        finally:
            pool.shutdown(cancel_futures=True)
        rows = [self.journal.rows.get(request.key) for request in requests]
        return [Reply(row["text"], row["cut"]) if row else None for row in rows]

    def spend(self) -> dict[str, Any]:
        """Requests, tokens, cost, resumed sessions in; retries and failures of this one; why nothing more is asked."""
        rows = self._kept()
        return {
            "model": self.endpoint.model, "replies": len(rows),
            "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
            "completion_tokens": sum(row["completion_tokens"] for row in rows),
            "cost": self._cost, "retried": self.retried, "failed": dict(self.failures),
            "stopped": self._stopped or None,
        }  # fmt: skip

    def _kept(self) -> list[dict[str, Any]]:
        return [row for row in self.journal.rows.values() if row.get("model") == self.endpoint.model]

    def _price(self, prompt_tokens: float, completion_tokens: float) -> float:
        """In the prices' currency."""
        return (prompt_tokens * self.endpoint.price_in + completion_tokens * self.endpoint.price_out) / 1e6

    def _try(self, request: Request) -> None:
        """Ask once the budget allows it; a failure is counted, and after too many in a row nothing more is asked."""
        import openai

        limit, count = self.endpoint.max_cost or math.inf, self.endpoint.max_requests or math.inf
        most = self._price(_characters(request) / CHARACTERS_PER_TOKEN, request.max_tokens)
        with self._guard:
            while self._under_way and self._cost + sum(self._under_way) + most > limit:
                self._guard.wait()  # those under way may leave enough
            if not self._stopped and self._cost + most > limit:
                self._stopped = f"max_cost={limit:g} is reached"
            if not self._stopped and self._requests >= count:
                self._stopped = f"max_requests={count} is reached"
            if self._stopped:
                self.failures[f"not asked: {self._stopped}"] += 1
                return
            self._requests += 1
            self._under_way.append(most)
        try:
            row = self._complete(request)
            cost = self._price(row["prompt_tokens"], row["completion_tokens"])
            self.journal.add(request.key, row | {"model": self.endpoint.model, "cost": cost})
            with self._guard:
                self._cost += cost
                self._in_a_row = 0
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            self._stopped = "the server refuses the key or the model"
            remedy = "see that base_url ends as the server wants it (most: /v1) and that it knows a model of that name"
            if error.status_code != 404:
                name = self.endpoint.api_key_env or "an environment variable"
                remedy = f"put a valid key into {name}, and name that variable with api_key_env="
            where = f"{self.endpoint.base_url} refuses model={self.endpoint.model}"
            raise ModelError(f"{where} with status {error.status_code}: {remedy}") from error
        except (openai.APIError, GarbageError) as error:
            with self._guard:
                self.failures[type(error).__name__] += 1
                self._in_a_row += 1
                if self._in_a_row >= FAILURES_IN_A_ROW and not self._stopped:
                    self._stopped = f"{self._in_a_row} requests failed one after the other"
                    first_line = next(iter(redact_text(str(error)).splitlines()), "")
                    log.warning("%s: %s; the last: %s", self.endpoint.model, self._stopped, first_line[:200])
        finally:
            with self._guard:
                self._under_way.remove(most)
                self._guard.notify_all()

    def _complete(self, request: Request) -> dict[str, Any]:
        """The reply as the journal keeps it. openai.APIError or GarbageError once all retries are used up."""
        optional = {name: getattr(request, name) for name in ("temperature", "top_p", "seed")}
        optional["tools"] = request.context.get("tools")
        if kwargs := request.context.get("chat_template_kwargs"):
            optional["extra_body"] = {"chat_template_kwargs": kwargs}  # what vLLM, SGLang and llama.cpp call it too
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [_with_calls(message, json.dumps) for message in request.messages],
            self.endpoint.limit_field: request.max_tokens,
            **{key: value for key, value in optional.items() if value is not None},
        }
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                time.sleep(min(LONGEST_PAUSE, 0.25 * 2 ** (attempt - 1)))
            raw = self.client.chat.completions.with_raw_response.create(**body)
            with self._guard:
                self._requests += attempt > 0
                self.retried += raw.retries_taken + (attempt > 0)
            try:
                return _read(raw.parse(), request)
            except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
                garbage = error
        raise GarbageError("a reply without a message in it") from garbage


def refuse_silent(key: str, endpoint: Endpoint) -> None:
    """ConfigError where `key` cannot be asked: no client, no key, nobody at the address (unknown behind a proxy)."""
    if fault := missing_package(f"a model behind a server ({key}.base_url)", "openai"):
        raise ConfigError(fault)
    _read_key(endpoint)
    address = urlsplit(endpoint.base_url)
    if any(name in os.environ for name in (f"{address.scheme}_proxy", f"{address.scheme}_proxy".upper())):
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except TimeoutError:  # slow is not certainly wrong
        return
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}.base_url={endpoint.base_url}: nobody answers there ({getattr(error, 'strerror', None) or error}): "
            "start the server first, or name its address, such as http://localhost:8000/v1"
        ) from error


def _read_key(endpoint: Endpoint) -> str:
    """The server's key, from the environment; "none" where it wants none."""
    if endpoint.api_key_env is None:
        return "none"
    if key := os.environ.get(endpoint.api_key_env):
        return key
    raise ConfigError(
        f"api_key_env={endpoint.api_key_env}: the environment has no such variable; set it to the server's key"
    )


def _characters(request: Request) -> int:
    return len(conversation_text(with_context(request.messages, request.context)))


def _with_calls(message: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """`message` with the arguments of its calls as the other side has them: a template values, a server JSON text."""
    given = [call for call in message.get("tool_calls") or () if "function" in call]
    calls = [call | {"function": dict(call["function"])} for call in given]
    for function in (call["function"] for call in calls):
        if isinstance(function.get("arguments"), str) == (convert is json.loads):
            function["arguments"] = convert(function["arguments"])
    return message | {"tool_calls": calls} if calls else message


def _read(completion: Any, request: Request) -> dict[str, Any]:
    choice, usage = completion.choices[0], completion.usage
    said = choice.message.model_dump(include={"content", "tool_calls"}, exclude_none=True)
    calls = _with_calls(said, json.loads).get("tool_calls", [])
    text = said.get("content") or (message_text({"tool_calls": calls}) if calls else choice.message.content)
    if text is None and choice.finish_reason:  # a filter, or thinking that used up the limit: asking again only costs
        text = ""
    if not isinstance(text, str):
        raise TypeError(f"content is {type(text).__name__}")
    counts = {
        "prompt_tokens": _characters(request) // CHARACTERS_PER_TOKEN,
        "completion_tokens": len(text) // CHARACTERS_PER_TOKEN,
    }
    with suppress(AttributeError, TypeError):  # a server that counts no tokens is priced by its characters
        counts = {name: int(getattr(usage, name)) for name in counts}
    clean = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written to any file
    return {"text": clean, "cut": choice.finish_reason == "length", **counts} | ({"calls": calls} if calls else {})
