"""In place of llama.cpp, for tests of its supervision: a server that answers at once, and ends as it is told to.

The file of the model says how: `{}`, or `{"ends": code}` for one that ends before it serves. Each start adds a line to
`MODEL.starts`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class CommonParams(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(model=SimpleNamespace(path=""), cpuparams=SimpleNamespace(n_threads=0), api_keys=[])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    key = ""

    def do_GET(self) -> None:
        self.answer({"pid": os.getpid(), "data": [{"id": "stand-in"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = asked["messages"][-1]["content"]
        if words.startswith("wait for "):
            gate = Path(words.removeprefix("wait for "))
            Path(f"{gate}.waits").touch()
            while not gate.exists():
                time.sleep(0.01)
        choice = {"message": {"role": "assistant", "content": f"{os.getpid()}"}, "finish_reason": "stop"}
        self.answer({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    def answer(self, content: dict[str, Any]) -> None:
        is_known = self.headers["Authorization"] == f"Bearer {self.key}"
        data = json.dumps(content if is_known else {"error": "no"}).encode()
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server:
    def __init__(self, params: Any) -> None:
        model = Path(params.model.path)
        with model.with_name(f"{model.name}.starts").open("a") as starts:
            starts.write(f"{os.getpid()}\n")
        told = json.loads(model.read_text())
        if "ends" in told:
            print("told to end", flush=True)
            os._exit(told["ends"])
        handler = type("Handler", (_Handler,), {"key": params.api_keys[0]})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{server.server_address[1]}"
