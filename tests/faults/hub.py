"""A stand-in for the Hub on the loopback address, and the ways in which it can fail.

It speaks what `huggingface_hub` asks of the real one: the look-up of a repository, the listing of a commit, HEAD and GET
of a file by revision, and a second host (`localhost`) for the bytes of large files, whose ETag says nothing there.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".parquet", ".bin", ".pth")
SLOWLY = 1.0
"""Seconds between what a slow Hub sends."""

STEADY_SECONDS = 33
"""What a file takes from a Hub that is slow but steady: longer than one is waited for that brings next to nothing."""

SLOWED_BYTES = 40_000
"""Of a file, at least, for that: a smaller one would come too slowly to be waited for."""


@dataclass(frozen=True)
class Repository:
    """One commit of a repository; `kind` is `models` or `datasets`, `branches` are the names of the commit."""

    kind: str
    name: str
    files: Mapping[str, bytes]
    branches: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        texts = "".join(f"{name} {announced_hash(name, body)}\n" for name, body in sorted(self.files.items()))
        return hashlib.sha1(f"{self.kind} {self.name}\n{texts}".encode()).hexdigest()

    def listing(self) -> list[dict[str, Any]]:
        """The files as the listing of a commit has them."""
        found = []
        for name, body in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": git_hash(body)}
            if is_large(name):
                entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
            found.append(entry)
        return found


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def git_hash(body: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def announced_hash(name: str, body: bytes) -> str:
    """The ETag of a file: by git for a small one, SHA-256 for a large one."""
    return hashlib.sha256(body).hexdigest() if is_large(name) else git_hash(body)


@dataclass(frozen=True)
class Asked:
    """A request; `what` is look-up, listing, file or bytes (of a large file, at the second host), else other."""

    method: str
    path: str
    what: str
    repository: Repository | None = None
    name: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Answer:
    """A response; `sent` is what really goes over the wire, where that is not the body: so many bytes, then a pause."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: bytes | None = None
    at_a_time: int = 1 << 20
    pause: float = 0.0


Trouble = Callable[[Asked, Answer], Answer | None]
"""What becomes of an answer; None: there is none, and the connection stays open."""


class StandIn:
    """The Hub, as a context: it listens inside.

    `applied` holds the requests that the trouble changed the answer to, and `longest` the seconds that the longest of these
    answers took so far.

    Args:
        trouble: what is wrong with it; nothing else is wrong than what this says.
        target: the name of the repository that the trouble is with.
        storage: where the real Hub's storage protocol for large files (Xet) is to be spoken; none is behind it here.
    """

    def __init__(
        self, repositories: list[Repository], trouble: Trouble | None = None, target: str = "", storage: str = ""
    ) -> None:
        self.repositories, self.trouble, self.target, self.storage = repositories, trouble, target, storage
        self.asked: list[Asked] = []
        self.applied: list[Asked] = []
        self.longest = 0.0
        self.connections = 0
        self.closing = threading.Event()

    def __enter__(self) -> "StandIn":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.serve(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def get_request(self) -> Any:
                hub.connections += 1
                return super().get_request()

            def handle_error(self, *_: Any) -> None:
                pass  # a client that was killed in the middle

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """From now on connections are refused."""
        if not self.closing.is_set():
            self.closing.set()
            self.server.shutdown()
            self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def requests(self, what: str) -> int:
        return sum(each.what == what for each in self.asked)

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answers one request, as the trouble will have it."""
        asked = self._understand(handler.command, handler.path.split("?")[0])
        self.asked.append(asked)
        started, well = time.monotonic(), self._answer(asked)
        answer: Answer | None = well
        if self.trouble and asked.repository and asked.repository.name == self.target:
            answer = self.trouble(asked, well)
        if answer != well:
            self.applied.append(asked)
        if answer is None:
            self.closing.wait()
            return
        handler.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers, "Connection": "close"}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            sent = answer.body if answer.sent is None else answer.sent
            for start in range(0, len(sent), answer.at_a_time):
                if self.closing.wait(answer.pause):
                    break
                handler.wfile.write(sent[start : start + answer.at_a_time])
                if answer != well:
                    self.longest = max(self.longest, time.monotonic() - started)

    def _understand(self, method: str, path: str) -> Asked:
        if look_up := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(/.+)?", path):
            what = "listing" if look_up[3] == "tree" else "look-up"
            folder = (look_up[5] or "").strip("/")
            return Asked(method, path, what, self._find(look_up[1], look_up[2]), folder, look_up[4] or "main")
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._find("datasets" if file[1] else "models", file[2])
            return Asked(method, path, "file", repository, file[4], file[3])
        if large := re.fullmatch(r"/bytes/(models|datasets)/([^/]+/[^/]+)/(.+)", path):
            return Asked(method, path, "bytes", self._find(large[1], large[2]), large[3], "main")
        return Asked(method, path, "telemetry" if "telemetry" in path else "other")

    def _find(self, kind: str, name: str) -> Repository | None:
        return next((each for each in self.repositories if (each.kind, each.name) == (kind, name)), None)

    def _answer(self, asked: Asked) -> Answer:
        repository = asked.repository
        if asked.path == "/storage-token":
            token = {"X-Xet-Access-Token": "none", "X-Xet-Token-Expiration": str(int(time.time()) + 3600)}
            return Answer(200, {**token, "X-Xet-Cas-Url": self.storage}, b"{}")
        if repository is None:
            return refusal(401, "RepoNotFound") if asked.what in ("look-up", "listing", "file") else refusal(404)
        if asked.revision not in (*repository.branches, repository.commit):
            return refusal(404, "RevisionNotFound")
        commit = {"X-Repo-Commit": repository.commit}
        if asked.what == "look-up":
            siblings = [{"rfilename": name} for name in repository.files]
            return as_json({"id": repository.name, "sha": repository.commit, "siblings": siblings})
        if asked.what == "listing":
            found = [
                each for each in repository.listing() if each["path"].startswith(f"{asked.name}/" if asked.name else "")
            ]
            return as_json(found) if found else refusal(404, "EntryNotFound")
        body = repository.files.get(asked.name)
        if body is None:
            return replace(refusal(404, "EntryNotFound"), headers={"X-Error-Code": "EntryNotFound", **commit})
        if asked.what == "bytes":
            return Answer(200, {"ETag": f'"{hashlib.md5(body).hexdigest()}-1"'}, body)
        etag = f'"{announced_hash(asked.name, body)}"'
        if is_large(asked.name):
            where = f"http://localhost:{self.port}/bytes/{repository.kind}/{repository.name}/{asked.name}"
            linked = {"X-Linked-ETag": etag, "X-Linked-Size": str(len(body)), "Location": where}
            if self.storage:
                linked |= {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": f"{self.url}/storage-token"}
            return Answer(302, {**commit, **linked, "ETag": '"of-the-pointer"'})
        return Answer(200, {**commit, "ETag": etag}, body)


def as_json(document: Any) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


def refusal(status: int, code: str = "", **headers: str) -> Answer:
    return Answer(status, {**({"X-Error-Code": code} if code else {}), **headers})


# --- what can be wrong ------------------------------------------------------------------------------------------------

PAGE = b"<!doctype html><title>Log in to the network of this house</title>"


def always(answer: Answer | None) -> Trouble:
    """To every request."""
    return lambda asked, well: answer


def to(what: tuple[str, ...], trouble: Trouble) -> Trouble:
    """To some kinds of requests."""
    return lambda asked, well: trouble(asked, well) if asked.what in what else well


def to_content(trouble: Callable[[Answer], Answer | None]) -> Trouble:
    """To what delivers the content of a file; its length and hash were announced before, truly."""
    return lambda asked, well: trouble(well) if asked.method == "GET" and well.status == 200 and asked.name else well


def at_first(times: int, trouble: Trouble) -> Trouble:
    """To the first requests of each kind for each file."""
    counted: dict[tuple[str, str, str], int] = {}

    def some(asked: Asked, well: Answer) -> Answer | None:
        key = (asked.method, asked.what, asked.name)
        counted[key] = counted.get(key, 0) + 1
        return trouble(asked, well) if counted[key] <= times else well

    return some


def cut(well: Answer) -> Answer:
    return replace(well, sent=well.body[: len(well.body) // 2])


def shorter(well: Answer) -> Answer:
    return replace(well, body=well.body[:-7])


def longer(well: Answer) -> Answer:
    return replace(well, body=well.body + b"\n\n\n\n\n\n\n")


def other_bytes(well: Answer) -> Answer:
    """The same length, one bit of it changed, where neither JSON nor a safetensors header notices: near the end."""
    position = max(0, len(well.body) - 12)
    changed = well.body[position] ^ 1
    return replace(well, body=well.body[:position] + bytes([changed]) + well.body[position + 1 :])


def slow(well: Answer) -> Answer:
    return replace(well, at_a_time=1, pause=SLOWLY)


def slow_but_steady(well: Answer) -> Answer:
    size = len(well.body)
    return well if size < SLOWED_BYTES else replace(well, at_a_time=-(-size // STEADY_SECONDS), pause=SLOWLY)


def in_a_circle(asked: Asked, well: Answer) -> Answer:
    return Answer(302, {"Location": asked.path})


def without_commit(asked: Asked, well: Answer) -> Answer:
    return replace(well, headers={name: value for name, value in well.headers.items() if name != "X-Repo-Commit"})


API, FILES = ("look-up", "listing"), ("file", "bytes")
EXPECTED_LATER = 6


@dataclass(frozen=True)
class Kind:
    """A kind of trouble, and the exit codes that it must end with where it befalls a model and a data set.

    `waits`: politune has to wait before it may give up, which takes about half a minute. `lasts`: the seconds that an answer
    in trouble must have taken.
    """

    trouble: Trouble
    model: int = EXPECTED_LATER
    data: int = EXPECTED_LATER
    waits: bool = False
    lasts: float = 0.0


def kinds() -> dict[str, Kind]:
    """Every kind of trouble by its name; made anew for each trial, because some count."""
    return {
        "gated, nobody logged in": Kind(to(FILES, always(refusal(401, "GatedRepo"))), 5, 5),
        "gated, terms not accepted": Kind(to(FILES, always(refusal(403, "GatedRepo"))), 5, 5),
        "gated from the look-up on": Kind(always(refusal(403, "GatedRepo")), 5, 5),
        "private": Kind(always(refusal(401, "RepoNotFound")), 4, 3),
        "not there": Kind(always(refusal(404, "RepoNotFound")), 4, 3),
        "forbidden": Kind(always(refusal(403)), 5, 5),
        "a file is gone": Kind(to(FILES, always(refusal(404, "EntryNotFound"))), 4, 3),
        "429": Kind(always(refusal(429))),
        "429 at the files": Kind(to(FILES, always(refusal(429))), waits=True),
        "429, to wait an hour": Kind(to(FILES, always(refusal(429, **{"Retry-After": "3600"})))),
        "429, by its rate limit": Kind(to(FILES, always(refusal(429, ratelimit='"api";r=0;t=290')))),
        "500": Kind(always(refusal(500))),
        "502 at the files": Kind(to(FILES, always(refusal(502))), waits=True),
        "503 at the listing": Kind(to(("listing",), always(refusal(503))), waits=True),
        "503 at the content": Kind(to_content(lambda well: refusal(503))),
        "504": Kind(always(refusal(504))),
        "503 once, then well": Kind(at_first(1, always(refusal(503))), 0, 0),
        "500 twice, then well": Kind(at_first(2, always(refusal(500))), 0, 0),
        "a byte per second": Kind(to_content(slow), waits=True, lasts=25),
        "slow but steady, for more than half a minute": Kind(
            to_content(slow_but_steady), 0, 0, waits=True, lasts=STEADY_SECONDS - 2
        ),
        "a byte per second of the look-up": Kind(to(API, lambda asked, well: slow(well)), waits=True, lasts=25),
        "cut in the middle": Kind(to_content(cut)),
        "cut once, then well": Kind(at_first(1, to_content(cut)), 0, 0),
        "shorter than announced": Kind(to_content(shorter)),
        "longer than announced": Kind(to_content(longer)),
        "other bytes of the same length": Kind(to_content(other_bytes)),
        "in a circle": Kind(in_a_circle),
        "in a circle at the files": Kind(to(FILES, in_a_circle)),
        "no answer": Kind(always(None), waits=True),
        "no answer at the files": Kind(to(FILES, always(None)), waits=True),
        "no answer at the content": Kind(to_content(lambda well: None), waits=True),
        "a page in place of JSON": Kind(to(API, always(Answer(200, {}, PAGE)))),
        "a page in place of everything": Kind(always(Answer(200, {}, PAGE))),
        "JSON of another shape": Kind(to(API, always(as_json([])))),
        "JSON without a commit": Kind(to(API, always(as_json({"id": "x", "siblings": []})))),
        "files without a commit": Kind(to(FILES, without_commit)),
        "redirected to nowhere": Kind(to(FILES, always(Answer(302, {"Location": "http://localhost:9/x"})))),
    }


def wait_until(true: Callable[[], bool], limit: float = 60.0) -> bool:
    """Waits until it is; False after the limit."""
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
