"""A stand-in for an OpenAI-compatible endpoint on the loopback address, and the ways in which it can fail."""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LEFT = "shared public provision"
RIGHT = "private choice and low taxes"


@dataclass(frozen=True)
class Answer:
    """A response; it is sent so many bytes at a time, with a pause before each."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    at_a_time: int = 1 << 20
    pause: float = 0.0
    length: int | None = None


def completion(text: str | None, **changes: Any) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **changes}
    document = {"id": "x", "object": "chat.completion", "choices": [choice]}
    return Answer(body=json.dumps({**document, "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode())


def refusal(status: int, message: str = "", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps({"error": {"message": message}}).encode(), named)


def echo(text: str, **changes: Any) -> Answer:
    """A completion that says it in every field, but for these of its message."""
    message = {"role": text, "content": text, "refusal": text, "name": text, **changes}
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", text), text)
    named = dict.fromkeys(("id", "object", "model", "system_fingerprint", text), text)
    choice = {"index": text, "message": message, "finish_reason": text, "stop_reason": text}
    return Answer(body=json.dumps({**named, "choices": [choice], "usage": usage}).encode(), headers={"X-Echo": text})


class StandIn:
    """The endpoint, as a context: it listens inside.

    Args:
        answer: what becomes of a prompt; the second argument is how many requests came before.
    """

    def __init__(self, answer: Callable[[str, int], Answer | str]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at: list[float] = []
        self.most_at_once = self._at_once = 0
        self.closing, self._lock = threading.Event(), threading.Lock()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "StandIn":
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stand_in.serve(self)

            def do_GET(self) -> None:
                stand_in.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # a client that went away

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length") or 0)) or b"{}")
        with self._lock:
            before = len(self.bodies)
            self.bodies.append({"messages": [{"content": ""}], **body})
            self.headers.append(dict(handler.headers))
            self.at.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            found = self.answer(self.prompts[before], before)
        finally:
            with self._lock:  # before it is sent: whoever has it may ask again at once
                self._at_once -= 1
        self._send(handler, completion(found) if isinstance(found, str) else found)

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        handler.send_response(answer.status)
        length = len(answer.body) if answer.length is None else answer.length
        for name, value in {"Content-Length": str(length), **answer.headers, "Connection": "close"}.items():
            handler.send_header(name, value)
        handler.end_headers()
        for start in range(0, len(answer.body), answer.at_a_time):
            if self.closing.wait(answer.pause):
                return
            handler.wfile.write(answer.body[start : start + answer.at_a_time])
            handler.wfile.flush()


# --- who judges as it should ------------------------------------------------------------------------------------------


def labels(prompt: str) -> dict[str, Any]:
    """What a perfect judge says of texts that name their side."""
    found: dict[str, Any] = {"topic": "housing" if "rent" in prompt else "taxes", "axis": "economic"}
    for letter, text in re.findall(r"<answer_([AB]) \w+>\n(.*?)\n</answer_", prompt, re.DOTALL):
        found[f"stance_{letter}"] = "left" if LEFT in text else "right" if RIGHT in text else "neither"
        found[f"strength_{letter}"] = 2
    return found


def judge(prompt: str, before: int = 0) -> str:
    return "Here you are:\n```json\n" + json.dumps(labels(prompt)) + "\n```"
