"""A W&B server for tests, on 127.0.0.1: it accepts one client's runs and views and remembers what was sent."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeWandb(ThreadingHTTPServer):
    """`with FakeWandb() as server:` then WANDB_BASE_URL=server.url; a `status` of 500 answers nothing but errors."""

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def __enter__(self) -> "FakeWandb":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: str) -> dict[str, Any]:
        self.bodies.append(body)
        if path.endswith("/file_stream"):
            return self._take_rows(json.loads(body))
        if path != "/graphql":
            return {}
        query = json.loads(body)
        return {"data": self._graphql(query["query"], query.get("variables") or {})}

    def _take_rows(self, body: dict[str, Any]) -> dict[str, Any]:
        for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.history.append(json.loads(line))
        if body.get("complete"):
            self.exit_code = body.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket(" in query:
            self.runs.append(variables)
            entity = {"id": "e", "name": "someone"}
            project = {"id": "p", "name": variables["project"], "entity": entity}
            bucket = {"id": "b", "name": variables["name"], "displayName": variables["name"], "project": project}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        if "upsertView(" in query:
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
        if "createRunFiles(" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer {" in query:
            return {
                "viewer": {"id": "u", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
            }
        return {}


class _Handler(BaseHTTPRequestHandler):
    server: FakeWandb

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            raw = gzip.decompress(raw)
        reply = json.dumps(self.server.answer(self.path, raw.decode(errors="replace"))).encode()
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_PUT = do_GET = do_POST  # noqa: N815 (names that http.server calls)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""
