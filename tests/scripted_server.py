"""An OpenAI-compatible server on loopback that says what a test tells it to, and counts what it is asked."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Turn:
    """What the server does with one request: a status, a body (text: a good completion), headers."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    seconds: float = 0.0
    finish_reason: str = "stop"
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 2})


@dataclass
class Scripted:
    """The running server's address and what came in."""

    base_url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)  # completions sent, by what was asked


@contextmanager
def scripted_server(script: Callable[[int, dict[str, Any]], Turn]) -> Iterator[Scripted]:
    """A server that does what `script(number of the request, its body)` says."""
    guard = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with guard:
                number = len(known.bodies)
                known.bodies.append(body)
                known.headers.append({name.lower(): value for name, value in self.headers.items()})
            turn = script(number, body)
            stop.wait(turn.seconds)
            content = _completion(turn, body) if turn.raw is None else turn.raw
            try:
                self.send_response(turn.status)
                for name, value in {"Content-Type": "application/json", **turn.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                return
            if turn.status == 200 and turn.raw is None:
                with guard:
                    known.answered[asked(body)] += 1

        def log_message(self, *_: object) -> None:
            pass

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    known = Scripted(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield known
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def asked(body: dict[str, Any]) -> str:
    """What a request asks, the same whenever it is asked again."""
    return json.dumps([body["messages"], body.get("seed")])


def _completion(turn: Turn, body: dict[str, Any]) -> bytes:
    message = {"role": "assistant", "content": turn.text}
    choice = {"index": 0, "message": message, "finish_reason": turn.finish_reason}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
    return json.dumps(whole | ({"usage": turn.usage} if turn.usage else {})).encode()


def unreliable(answer):
    """`answer` (a function of a request's number and body) behind a server of which every fourth reply is a fault."""
    faults = [
        Turn(status=429, raw=b"{}", headers={"Retry-After-Ms": "5"}),
        Turn(status=500, raw=b"oops", headers={"Retry-After-Ms": "5"}),
        Turn(raw=b"<html>", headers={"Content-Type": "text/html"}),
        Turn(raw=b'{"choices": [{'),
        Turn(seconds=2),
    ]
    return lambda number, body: faults[number // 4 % 5] if number % 4 == 3 else answer(number, body)
