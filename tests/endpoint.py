"""An OpenAI-compatible endpoint on this machine, for tests: it answers as it is told, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def echoed(body: dict[str, Any]) -> str:
    return "said: " + body["messages"][-1]["content"]


class Endpoint:
    """A server; ``reply`` makes an answer of what was asked, or gives (status, text, headers) for something else."""

    def __init__(self, reply: Callable[[dict[str, Any]], Any] = echoed, key: str | None = None) -> None:
        self.reply, self.key = reply, key
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *parts: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.asked.append(body)
                    endpoint.headers.append(dict(self.headers))
                    endpoint._now += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._now)
                status, text, headers = endpoint._replied(self.path, dict(self.headers), body)
                with endpoint._lock:
                    endpoint._now -= 1
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _replied(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, str, dict[str, str]]:
        if path != "/v1/chat/completions":
            return 404, json.dumps({"error": {"message": "no such page"}}), {}
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, json.dumps({"error": {"message": f"wrong key {headers.get('Authorization')}"}}), {}
        given = self.reply(body)
        if isinstance(given, tuple):
            return given
        used = {"prompt_tokens": 10, "completion_tokens": 5}
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": given}}], "usage": used}), {}

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
