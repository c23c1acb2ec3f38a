"""An endpoint that speaks OpenAI's chat completions, asked by several threads, with an end to the patience.

The key is read from an environment variable and goes into one header of requests to one address: redirects are not followed,
and nothing that comes back is kept before the key is starred out of it. An answer has bounds in bytes and in seconds, whatever
the server sends.
"""

import ipaddress
import json
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias
from urllib.parse import urlsplit
from urllib.request import getproxies

from politune import errors
from politune.errors import ConfigError, HubError, MachineError, ModelError, PolituneError, safe

DEFAULT_KEY = "OPENAI_API_KEY"
NO_KEY = "none"
MOST_CONCURRENCY = 64
PATH = "/chat/completions"
BUSY = (408, 409, 425, 429)
NEVER = (405, 410, 501, 505)
ONE_REQUEST = (400, 413, 422)
"""May be the fault of one request, such as one that is longer than the model's context."""
STOPPED, CUT_OFF, FILTERED, REJECTED = "stop", "length", "content_filter", "rejected"
FINISHES = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), STOPPED),
    **dict.fromkeys(("length", "max_tokens", "model_length"), CUT_OFF),
    **dict.fromkeys(("content_filter", "refusal", "safety", "sensitive", "prohibited_content", "blocklist"), FILTERED),
}
"""How the providers call the ends of an answer; what is not among them is not kept."""
FILTER_CODES = {"content_filter", "content_policy_violation", "moderation_blocked", "responsibleaipolicyviolation"}
MOST_TOKENS_COUNTED = 10**9


@dataclass(frozen=True)
class Request:
    """A user's turn to be answered, by drawing with a seed where there is one."""

    prompt: str
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """What came back.

    Args:
        text: of the answer; empty where there is none. Of a request that the endpoint rejects: why it does.
        finish: how it ended: `stop`, `length`, `content_filter`, or `rejected` by the endpoint itself; empty where nobody says.
        prompt_tokens, answer_tokens: as counted by who answered, None where it does not say.
    """

    text: str
    finish: str = ""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    @classmethod
    def of(cls, text: str, finish: object, prompt_tokens: object, answer_tokens: object) -> "Reply":
        """From foreign values: what cannot be written, is not known or is no count is left out."""
        known = FINISHES.get(finish.strip().lower().replace("-", "_"), "") if isinstance(finish, str) else ""
        whole = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates can be sent and not be written
        return cls(whole, known, _count(prompt_tokens), _count(answer_tokens))

    @property
    def cut_off(self) -> bool:
        """Whether it met the limit, perhaps while the model was still weighing."""
        return self.finish == CUT_OFF or _WEIGHING.search(_WEIGHED.split(self.text)[-1]) is not None


Replied: TypeAlias = tuple[Request, Reply]
_WEIGHING = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_WEIGHED = re.compile(r"</think(?:ing)?>", re.IGNORECASE)


def answered(text: str) -> str:
    """A text without what a reasoning model weighs, to the end of it or not, before it answers."""
    return _WEIGHING.split(_WEIGHED.split(text)[-1])[0]


@dataclass(frozen=True)
class Limits:
    """Where patience ends."""

    answer_seconds: float = 120.0
    """For one answer, from the request to its last byte."""
    answer_bytes: int = 4 * 2**20
    """Of one answer; a long one has some kilobytes."""
    pauses: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """Seconds before each new try; after the last one it is over."""
    longest_wait: float = 120.0
    """Seconds that the endpoint may ask to be left alone for."""
    dear_tries: int = 2
    """Tries that may cost `answer_seconds` each, or the price of an answer."""


@dataclass(frozen=True)
class Settings:
    """What every request has in common."""

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and as whom.

    Args:
        url: of the API, without `/chat/completions`.
        model: its name there.
        key: a secret; not part of the representation.
        concurrency: requests at a time.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    concurrency: int = 4
    limits: Limits = Limits()

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    @property
    def generator(self) -> str:
        return self.model

    @property
    def is_near(self) -> bool:
        """Whether it is on this machine itself."""
        return _check_address(self.url)

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, as far as one can know from here."""
        return {"endpoint": self.url, "model": self.model}

    def answers(self, requests: Sequence[Request], settings: Settings) -> Iterator[list[Replied]]:
        """Replies as they come, in any order; what was in flight when one failed for good comes before the error.

        Raises:
            MachineError: the key is missing or refused.
            ModelError: there is no such model.
            ConfigError: the endpoint redirects, or refuses a request as it is.
            HubError: it cannot be reached, or patience is at its end.
        """
        yield from _Pool(self, settings).run(requests)

    def client(self) -> Any:
        """What asks.

        Raises:
            ConfigError: this environment's proxy or certificates, or the address, cannot be used.
        """
        import httpx

        headers = {"User-Agent": "politune", "Accept-Encoding": "identity"}  # a few packed bytes may be a gigabyte
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        seconds = self.limits.answer_seconds
        try:
            client = httpx.Client(
                headers=headers,
                follow_redirects=False,  # to whom would the key go?
                trust_env=not self.is_near,  # a proxy cannot reach this machine's own addresses
                verify=urlsplit(self.url).scheme
                == "https",  # loading certificates for nothing takes longer than an answer
                timeout=httpx.Timeout(seconds, connect=min(10.0, seconds)),
            )
            client.build_request("POST", self.url)  # some hosts are refused by nothing before
            return client
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"{safe(self.url)} is no address", where="--endpoint", why=safe(error)) from None
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(
                "no connection can be made with the proxy or the certificates that this environment names",
                why=safe(error),
                fix="look at HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE",
            ) from None


def connect(url: str, model: str, *, key_env: str | None, concurrency: int, limits: Limits | None = None) -> Endpoint:
    """Checks an endpoint's address and finds its key, without asking it.

    Args:
        key_env: the environment variable that holds the key; None: `OPENAI_API_KEY`, or no key for this machine itself;
            `none`: no key.

    Raises:
        ConfigError: the address cannot be used, or a key would cross the network in clear.
        MachineError: the variable is not set.
    """
    url = url.rstrip("/").removesuffix(PATH)
    is_near = _check_address(url)
    if not model.strip() or not model.isprintable():
        raise ConfigError(f"{safe(model)!r} is no name of a model", where="--endpoint-model")
    key = _key(key_env, is_near)
    if key is not None and not is_near and urlsplit(url).scheme == "http":
        raise ConfigError(
            f"{safe(url)} is not encrypted, so that the key could be read on the way",
            where="--endpoint",
            fix=f"give its https:// address, or --key-env {NO_KEY} if it needs no key",
        )
    return Endpoint(url, model, key, concurrency, limits or Limits())


def _check_address(url: str) -> bool:
    """Whether a sound address is one of this machine itself."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:  # also a part of a host that is empty or longer than 63 characters
        host, parts = None, urlsplit("")
    if parts.username is not None or parts.password is not None or "?" in url or "#" in url:
        raise ConfigError(
            "an address with a login, a query or a fragment in it would be recorded with them",
            where="--endpoint",
            fix="put the key into an environment variable and name it with --key-env",
        )
    if parts.scheme not in {"http", "https"} or not host or not url.isprintable() or " " in url:
        raise ConfigError(
            f"{safe(url)} is no address of an endpoint", where="--endpoint", fix="such as https://api.openai.com/v1"
        )
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(key_env: str | None, is_near: bool) -> str | None:
    if key_env == NO_KEY or (key_env is None and is_near):
        return None
    name = DEFAULT_KEY if key_env is None else key_env
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):  # perhaps the key itself: not repeated
        raise ConfigError(
            "this is no name of an environment variable",
            where="--key-env",
            fix="put the key into one, and name it in capitals",
        )
    if name not in errors.LOGINS:
        errors.LOGINS.append(name)
    key = os.environ.get(name, "").strip()
    if not key:
        raise MachineError(
            f"the environment variable {safe(name)} holds no key for the endpoint",
            line="endpoint key",
            fix=f"set it, name another one with --key-env, or --key-env {NO_KEY} if it needs none",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"what the environment variable {safe(name)} holds is no key", where="--key-env")
    return key


class _Pool:
    """Threads that ask; they are daemons, so that a server that never answers cannot keep the process alive."""

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint, self.settings, self.limits = endpoint, settings, endpoint.limits
        self.waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[Replied | PolituneError | Exception | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.slots = threading.Semaphore(endpoint.concurrency)
        self.asked_at: dict[int, float] = {}
        self.resume_at = 0.0
        self.limit_name = "max_tokens"

    def run(self, requests: Sequence[Request]) -> Iterator[list[Replied]]:
        for request in requests:
            self.waiting.put(request)
        workers = min(self.endpoint.concurrency, len(requests))
        client = self.endpoint.client()
        for _ in range(workers):
            threading.Thread(target=self._work, args=(client,), daemon=True).start()
        failure: Exception | None = None
        try:
            while workers:
                found = self._next()
                if found is None:
                    workers -= 1
                elif isinstance(found, Exception):
                    failure = failure or found
                    self.stop.set()
                else:
                    yield [found]  # whoever takes it keeps it before it takes the next one
                    self.slots.release()
        finally:
            self.stop.set()
            self.slots.release(self.endpoint.concurrency)
            client.close()
        if failure is not None:
            raise failure

    def _next(self) -> Replied | Exception | None:
        """What a thread has to say next; one that hangs where httpx has no time limit (drops of a header) is given up."""
        most = 2 * self.limits.answer_seconds + 1
        while True:
            try:
                return self.done.get(timeout=0.5)
            except queue.Empty:
                if any(time.monotonic() - since > most for since in tuple(self.asked_at.values())):
                    raise self._silent() from None

    def _work(self, client: Any) -> None:
        try:
            while True:
                self.slots.acquire()  # no more answers are under way, or not kept yet, than there are slots
                if self.stop.is_set():
                    break
                request = self.waiting.get_nowait()
                self.done.put((request, self._ask(client, request)))
        except queue.Empty:
            pass
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits for it
            if not isinstance(error, _Stopped):
                self.done.put(error)
        finally:
            self.done.put(None)

    def _ask(self, client: Any, request: Request) -> Reply:
        """One request until it is answered, or patience is at its end."""
        dear, outcome = 0, _Later("")
        for pause in (*self.limits.pauses, None):
            self._wait()
            found = self._try(client, request)
            if isinstance(found, Reply):
                return found
            outcome = found
            dear += outcome.is_dear
            if pause is None or dear >= self.limits.dear_tries:
                break
            if outcome.wait is not None:
                self._check_wait(outcome.wait)
                self.resume_at = max(self.resume_at, time.monotonic() + outcome.wait)
            self._sleep(max(pause, outcome.wait or 0.0))
        if outcome.is_dear and not outcome.is_silence:
            raise HubError(
                f"{safe(self.endpoint.url)} sends what is no answer to a chat completion",
                why="each may be paid for, so that it is asked again once only",
                fix="look at --endpoint and at what serves it",
            )
        raise HubError(
            f"{safe(self.endpoint.url)} does not answer",
            why=outcome.why,
            fix="what was answered is kept: run the same command again later, with a smaller --concurrency if it was too much",
        )

    def _try(self, client: Any, request: Request) -> "Reply | _Later":
        import httpx

        started = self.asked_at[threading.get_ident()] = time.monotonic()
        limit_name = self.limit_name  # another thread may find out that it is called otherwise
        try:
            with client.stream("POST", self.endpoint.url + PATH, json=self._body(request, limit_name)) as response:
                content = self._read(response, started)
                return self._understand(response.status_code, response.headers, content, limit_name)
        except httpx.ConnectError as error:
            if "refused" in str(error).lower():
                proxy = (
                    "" if self.endpoint.is_near or not getproxies() else ", or at the proxy that this environment names"
                )
                raise HubError(
                    f"nothing listens at {safe(self.endpoint.url)}{proxy}",
                    fix="start the server, or look at --endpoint",
                ) from None
            return _Later(f"it cannot be reached: {self._shown(error)}")
        except httpx.TimeoutException:
            return _Later(
                f"there was no answer within {self.limits.answer_seconds:g} seconds", is_silence=True, is_dear=True
            )
        except httpx.HTTPError as error:
            return _Later(f"the connection broke: {self._shown(error)}")
        finally:
            del self.asked_at[threading.get_ident()]

    def _body(self, request: Request, limit_name: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": request.prompt}],
            "temperature": self.settings.temperature,
            limit_name: self.settings.max_new_tokens,
        }
        return body if request.seed is None else {**body, "seed": request.seed}

    def _read(self, response: Any, started: float) -> bytes:
        """The body, within its bounds; a read of httpx has a time limit of its own, and a drip meets it for ever."""
        import httpx

        content = bytearray()
        for part in response.iter_raw():
            content += part
            if len(content) > self.limits.answer_bytes:
                raise HubError(
                    f"{safe(self.endpoint.url)} sends an answer of more than {self.limits.answer_bytes:,} bytes",
                    fix="look at --endpoint: this is no answer to a chat completion",
                )
            if time.monotonic() - started > self.limits.answer_seconds:
                raise httpx.ReadTimeout("the answer does not end")
        return bytes(content)

    def _understand(self, status: int, headers: Any, content: bytes, limit_name: str) -> "Reply | _Later":
        said = self._complaint(content)
        if _is_filter(content):  # by any status: which one it is differs between providers
            return Reply("", FILTERED)
        if status in BUSY or (status >= 500 and status not in NEVER):
            if status == 429 and "insufficient_quota" in content.decode("utf-8", "replace"):
                raise HubError(
                    "the endpoint says that its quota is spent", why=said, fix="run it again when there is some"
                )
            wait = _seconds(headers.get("retry-after", ""))
            return _Later(f"it answers {status}" + (f": {said}" if said else ""), wait=wait)
        if 300 <= status < 400:
            where = safe(_host(self._without_key(headers.get("location", ""))) or "nowhere")
            raise ConfigError(
                f"{safe(self.endpoint.url)} redirects to {where}, which is not followed: the rows and the key would go there",
                where="--endpoint",
                fix="give the address that answers itself",
            )
        if status in (401, 402, 403):
            raise MachineError(
                f"{safe(self.endpoint.url)} refuses the key or the account ({status})",
                line="endpoint key",
                why=said or None,
                fix="look at the variable that --key-env names",
            )
        if status == 404:
            raise ModelError(
                f"there is no model {safe(self.endpoint.model)} at {safe(self.endpoint.url)}, or no {PATH}",
                why=said or None,
                fix="look at --endpoint-model and --endpoint",
            )
        if status in NEVER:
            raise ConfigError(
                f"{safe(self.endpoint.url)} takes no chat completions ({status})",
                where="--endpoint",
                why=said or None,
                fix=f"give the address that {PATH} is added to",
            )
        if status == 400 and "max_completion_tokens" in said and limit_name == "max_tokens":
            self.limit_name = "max_completion_tokens"  # what OpenAI's newer models call it
            return _Later(said)
        if status in ONE_REQUEST:
            return Reply(f"it is refused ({status})" + (f": {said}" if said else ""), REJECTED)
        if status != 200:
            raise ConfigError(f"{safe(self.endpoint.url)} refuses the request ({status})", why=said or None)
        reply = _reply(content)
        if reply is None:
            return _Later("what it sends is no answer to a chat completion", is_dear=True)
        return replace(reply, text=self._without_key(reply.text))

    def _complaint(self, content: bytes) -> str:
        """The endpoint's own words about an error; empty where there are none."""
        with suppress(ValueError, RecursionError):
            document = json.loads(content)
            error = document.get("error") if isinstance(document, dict) else None
            message = error.get("message") if isinstance(error, dict) else error
            if isinstance(message, str):
                return self._shown(message)
        return ""

    def _shown(self, text: object) -> str:
        return safe(self._without_key(str(text)))

    def _without_key(self, text: str) -> str:
        key = self.endpoint.key
        return text.replace(key, "***") if key and len(key) >= errors.LEAST_LOGIN_CHARACTERS else text

    def _check_wait(self, seconds: float) -> None:
        if seconds > self.limits.longest_wait:
            raise HubError(
                f"{safe(self.endpoint.url)} asks to wait for {seconds:,.0f} seconds",
                fix="what was answered is kept: run the same command again then, with a smaller --concurrency",
            )

    def _wait(self) -> None:
        """All threads keep still for as long as one of them was told to."""
        while (left := self.resume_at - time.monotonic()) > 0:
            self._sleep(left)

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _Stopped

    def _silent(self) -> HubError:
        return HubError(f"{safe(self.endpoint.url)} does not answer", fix="run the same command again later")


class _Stopped(Exception):
    """The other threads are to end."""


@dataclass(frozen=True)
class _Later:
    """A try that failed in a way that may pass."""

    why: str
    wait: float | None = None
    is_silence: bool = False
    is_dear: bool = False


def _reply(content: bytes) -> Reply | None:
    """The first choice of a chat completion; None where it is none."""
    try:
        document = json.loads(content)
        choice = document["choices"][0]
        message, finish, usage = choice["message"], choice.get("finish_reason"), document.get("usage")
        text, refusal = _text(message.get("content")), message.get("refusal")
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if isinstance(refusal, str) and refusal:
        text, finish = text or refusal, FILTERED
    counted = usage if isinstance(usage, dict) else {}
    return Reply.of(text, finish, counted.get("prompt_tokens"), counted.get("completion_tokens"))


def _text(content: object) -> str:
    """A message's text, which some endpoints send in parts.

    Raises:
        TypeError: it is none.
    """
    if isinstance(content, list):
        parts = [each["text"] for each in content if each["type"] in ("text", "output_text")]
        return "".join(parts)
    if not isinstance(content, str | None):
        raise TypeError
    return content or ""


def _is_filter(content: bytes) -> bool:
    """Whether an error says that a prompt was refused for what it is about, in OpenAI's, Azure's or OpenRouter's form."""
    with suppress(ValueError, RecursionError):
        document = json.loads(content) if b'"error"' in content else None
        error = document.get("error") if isinstance(document, dict) else None
        if isinstance(error, dict):
            inner, metadata = error.get("innererror"), error.get("metadata")
            codes = [error.get("code"), error.get("type"), inner.get("code") if isinstance(inner, dict) else None]
            flagged = isinstance(metadata, dict) and ("flagged_input" in metadata or "reasons" in metadata)
            return flagged or any(isinstance(code, str) and code.lower() in FILTER_CODES for code in codes)
    return False


def _host(location: str) -> str:
    """Where a redirect goes, without a login in it."""
    with suppress(ValueError):
        return urlsplit(location).hostname or ""
    return ""


def _count(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < MOST_TOKENS_COUNTED else None


def _seconds(retry_after: str) -> float | None:
    """What a Retry-After header asks for: seconds, or a date."""
    with suppress(ValueError):
        seconds = float(retry_after)
        return max(0.0, seconds) if seconds == seconds else None
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None
