"""Asking an endpoint: what is sent, what is tried again, where patience ends, and where the key goes."""

import gzip
import json
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from politune import errors
from politune.errors import ConfigError, HubError, MachineError, ModelError, PolituneError
from politune.selection import answering, endpoint
from politune.selection.answering import Asking
from politune.selection.endpoint import Limits, Reply, Request, Settings
from unit.stand_in_endpoint import Answer, StandIn, completion, echo, refusal

KEY = "sk-canary-0123456789abcdef"
QUICK = Limits(answer_seconds=2.0, answer_bytes=100_000, pauses=(0.01, 0.02), longest_wait=2.0)
SETTINGS = Settings(0.0, 50)


@pytest.fixture(autouse=True)
def logins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "LOGINS", list(errors.LOGINS))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(url: str, *prompts: str, limits: Limits = QUICK, concurrency: int = 2, key: str | None = None) -> list[Reply]:
    where = endpoint.Endpoint(url, "tiny", key, concurrency, limits)
    groups = list(where.answers([Request(prompt) for prompt in prompts], SETTINGS))
    replies = {request.prompt: reply for group in groups for request, reply in group}
    return [replies[prompt] for prompt in prompts]


def test_every_prompt_is_asked_once_and_answered() -> None:
    with StandIn(lambda prompt, before: prompt.upper()) as server:
        replies = ask(server.url, *"abcdefgh")
    assert [reply.text for reply in replies] == list("ABCDEFGH")
    assert replies[0] == Reply("A", "stop", 100, 10)
    assert sorted(server.prompts) == list("abcdefgh")
    assert server.bodies[0] == {
        "model": "tiny", "messages": [{"role": "user", "content": server.prompts[0]}], "temperature": 0.0, "max_tokens": 50,
    }  # fmt: skip
    assert all("Authorization" not in each for each in server.headers)


def test_a_seed_is_sent_where_there_is_one() -> None:
    with StandIn(lambda prompt, before: "x") as server:
        list(endpoint.Endpoint(server.url, "tiny").answers([Request("a", 7)], SETTINGS))
    assert server.bodies[0]["seed"] == 7


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_at_a_time(concurrency: int) -> None:
    def slowly(prompt: str, before: int) -> str:
        time.sleep(0.1)
        return "x"

    with StandIn(slowly) as server:
        ask(server.url, *"abcdef", concurrency=concurrency)
    assert server.most_at_once == concurrency


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 524])
def test_what_may_pass_is_tried_again(status: int) -> None:
    with StandIn(lambda prompt, before: refusal(status) if before < 2 else "at last") as server:
        assert [reply.text for reply in ask(server.url, "a")] == ["at last"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_patience_ends(status: int) -> None:
    with (
        StandIn(lambda prompt, before: refusal(status, "come back later")) as server,
        pytest.raises(HubError, match="come back later") as caught,
    ):
        ask(server.url, "a")
    assert len(server.bodies) == 1 + len(QUICK.pauses)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("in_seconds", ["1", "date"])
def test_retry_after_is_respected_by_all_threads(in_seconds: str) -> None:
    """Without the header the second try comes after 0.01 seconds; a date has whole seconds, so one of 2 waits for 1 at least."""
    after = in_seconds if in_seconds != "date" else formatdate(time.time() + 2, usegmt=True)

    def answer(prompt: str, before: int) -> str | Answer:
        if before == 1:  # on its way already; when it is answered the other thread has long been refused
            time.sleep(0.4)
        return refusal(429, Retry_After=after) if before == 0 else "x"

    with StandIn(answer) as server:
        ask(server.url, "a", "b", "c", "d", concurrency=2)
    waits = sorted(at - server.at[0] for at in server.at[1:])
    assert len(waits) == 4
    assert waits[1] >= 0.9, "one that was on its way already may have come before"


def test_without_retry_after_the_wait_is_short() -> None:
    """The negative control of the test before."""
    with StandIn(lambda prompt, before: refusal(429) if before == 0 else "x") as server:
        ask(server.url, "a")
    assert server.at[1] - server.at[0] < 0.8


def test_a_wait_of_an_hour_is_not_waited_for() -> None:
    with (
        StandIn(lambda prompt, before: refusal(429, Retry_After="3600")) as server,
        pytest.raises(HubError, match="3,600 seconds"),
    ):
        ask(server.url, "a")
    assert len(server.bodies) == 1


def test_a_spent_quota_is_not_tried_again() -> None:
    body = b'{"error": {"message": "You have no money left", "code": "insufficient_quota"}}'
    with StandIn(lambda prompt, before: Answer(429, body)) as server, pytest.raises(HubError, match="no money left"):
        ask(server.url, "a")
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, MachineError, 5),
        (402, MachineError, 5),
        (403, MachineError, 5),
        (404, ModelError, 4),
        (405, ConfigError, 2),
        (501, ConfigError, 2),
        (418, ConfigError, 2),
    ],
)
def test_what_will_not_pass_is_said_at_once(status: int, kind: type[PolituneError], code: int) -> None:
    with (
        StandIn(lambda prompt, before: refusal(status, f"\x1b[31mno, says {KEY}")) as server,
        pytest.raises(kind) as caught,
    ):
        ask(server.url, "a", key=KEY)
    assert len(server.bodies) == 1
    assert caught.value.exit_code == code
    assert "no, says ***" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_nothing_that_was_in_flight_is_lost() -> None:
    """One request is refused while another one is still being answered: the other's reply comes before the error."""

    def answer(prompt: str, before: int) -> Answer | str:
        time.sleep(0.5 if prompt == "slow" else 0.1)
        return "kept" if prompt == "slow" else refusal(401)

    found = []
    with StandIn(answer) as server, pytest.raises(MachineError):
        for group in endpoint.Endpoint(server.url, "tiny", None, 2, QUICK).answers(
            [Request("slow"), Request("refused"), *map(Request, "abcdef")], SETTINGS
        ):
            found += group
    assert [reply.text for _, reply in found] == ["kept"]
    assert len(server.bodies) == 2, "after the refusal nothing more is asked"


@pytest.mark.parametrize(
    "body",
    [b"<html>Log in</html>", b"{}", b'{"choices": []}', b'{"choices": [3]}',
     b"[" * 100_000, b"\xff\xfe", b'{"choices": {"0": 1}}',
     b'{"choices": [{"message": {"content": 3}}]}'],
)  # fmt: skip
def test_what_is_no_answer_is_tried_again_and_given_up(body: bytes) -> None:
    with (
        StandIn(lambda prompt, before: Answer(body=body)) as server,
        pytest.raises(HubError, match="no answer to a chat"),
    ):
        ask(server.url, "a", limits=Limits(pauses=(0.01,) * 5))
    assert len(server.bodies) == 2, "each may be paid for"
    with StandIn(lambda prompt, before: Answer(body=body) if before == 0 else "well") as server:
        assert ask(server.url, "a")[0].text == "well"


def test_an_empty_answer_is_one() -> None:
    with StandIn(lambda prompt, before: completion(None, finish_reason="content_filter")) as server:
        assert ask(server.url, "a") == [Reply("", "content_filter", 100, 10)]


def test_an_answer_in_parts_is_read() -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    body = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    with StandIn(lambda prompt, before: Answer(body=body)) as server:
        assert ask(server.url, "a") == [Reply("one two")]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("stop", "stop"), ("MAX_TOKENS", "length"), ("refusal", "content_filter"), ("SAFETY", "content_filter"),
     ("content-filter", "content_filter"), ("sensitive", "content_filter"), ("\ud800", ""), (KEY, ""), ("x" * 9000, ""), (3, ""),
     ("rejected", "")],
)  # fmt: skip
def test_an_end_is_one_of_a_few(sent: object, kept: str) -> None:
    with StandIn(lambda prompt, before: completion("x", finish_reason=sent)) as server:
        assert ask(server.url, "a")[0].finish == kept


def test_a_refusal_beside_the_text_is_one() -> None:
    with StandIn(lambda prompt, before: completion(None, message={"content": None, "refusal": "I can't."})) as server:
        assert ask(server.url, "a")[0] == Reply("I can't.", "content_filter", 100, 10)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, {"code": "content_filter", "message": "filtered"}), (400, {"innererror": {"code": "ResponsibleAIPolicyViolation"}}),
     (403, {"code": 403, "metadata": {"reasons": ["violence"], "flagged_input": "a"}}), (200, {"code": "content_filter"})],
)  # fmt: skip
def test_a_filter_is_an_answer_whatever_its_status(status: int, error: dict[str, Any]) -> None:
    with StandIn(lambda prompt, before: Answer(status, json.dumps({"error": error}).encode())) as server:
        assert ask(server.url, "a") == [Reply("", "content_filter")]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_may_be_rejected_by_itself(status: int) -> None:
    with StandIn(lambda prompt, before: refusal(status, "too long") if prompt == "a" else "x") as server:
        replies = ask(server.url, "a", "b")
    assert replies[0] == Reply(f"it is refused ({status}): too long", "rejected")
    assert replies[1].text == "x"


@pytest.mark.parametrize("count", [10**9, 10**400, -1, True, "9", None])
def test_counts_that_are_none(count: object) -> None:
    body = json.dumps({"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": count}}).encode()
    with StandIn(lambda prompt, before: Answer(body=body)) as server:
        assert ask(server.url, "a") == [Reply("x")]


def test_what_was_weighed_is_no_answer() -> None:
    found = [endpoint.answered(f"<think>one</{tag}> two <think>three") for tag in ("think", "THINKING")]
    assert found == [" two ", " two "]
    assert endpoint.answered("one</think>two</think>three") == "three"
    assert Reply("<think>a</think> b <think> c").cut_off
    assert not Reply("<think>a</think> b").cut_off
    assert Reply("a", "length").cut_off
    assert endpoint.answered("<a" * 1_000_000) == "<a" * 1_000_000, "and takes no minute"


def test_lone_surrogates_can_be_written_afterwards(tmp_path: Path) -> None:
    with StandIn(lambda prompt, before: "a\ud800b") as server:
        text = ask(server.url, "a")[0].text
    (tmp_path / "text").write_text(text, encoding="utf-8")
    assert (text[0], text[-1]) == ("a", "b")


def test_a_huge_answer_is_cut_off() -> None:
    with (
        StandIn(lambda prompt, before: Answer(body=b"x" * 10_000_000)) as server,
        pytest.raises(HubError, match="more than 100,000 bytes"),
    ):
        ask(server.url, "a")


def test_few_packed_bytes_stay_few() -> None:
    """None is asked for; one that comes all the same is not unpacked, so that it is no answer, and not a too long one."""
    packed = Answer(body=gzip.compress(b"x" * 10_000_000), headers={"Content-Encoding": "gzip"})
    with StandIn(lambda prompt, before: packed) as server, pytest.raises(HubError, match="sends what is no answer"):
        ask(server.url, "a")
    assert server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("drip", [True, False], ids=["a drip", "silence"])
def test_an_answer_that_does_not_end_is_given_up(drip: bool) -> None:
    """A byte every 0.1 seconds meets the limit of each single read; nothing at all meets no limit of the body."""
    answer = Answer(body=b" " * 10_000, at_a_time=1, pause=0.1) if drip else Answer(body=b"", length=10)
    limits = Limits(answer_seconds=0.5, pauses=(0.01, 0.01, 0.01), dear_tries=2)
    started = time.monotonic()
    with StandIn(lambda prompt, before: answer) as server, pytest.raises(HubError, match=r"no answer within|broke"):
        ask(server.url, "a", limits=limits)
    assert time.monotonic() - started < 5
    assert len(server.bodies) <= 4


def test_a_header_that_does_not_end_is_given_up() -> None:
    """Each of its bytes comes within the time limit of a read, and no body ever begins."""

    def answer(prompt: str, before: int) -> str:
        return "never sent"

    class Dripping(StandIn):
        def _send(self, handler: Any, answer: Answer) -> None:
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
            while not self.closing.wait(0.1):
                handler.wfile.write(b"x")
                handler.wfile.flush()

    started = time.monotonic()
    with Dripping(answer) as server, pytest.raises(HubError, match="does not answer"):
        ask(server.url, "a", limits=Limits(answer_seconds=0.5))
    assert time.monotonic() - started < 5


def test_a_closed_port_is_said_at_once() -> None:
    with StandIn(lambda prompt, before: "x") as server:
        url = server.url
    with pytest.raises(HubError, match="nothing listens") as caught:
        ask(url, "a")
    assert caught.value.exit_code == 6


def test_a_redirect_is_not_followed() -> None:
    with StandIn(lambda prompt, before: "stolen") as thief:
        server = StandIn(lambda prompt, before: refusal(307, Location=thief.url + "/chat/completions"))
        with server, pytest.raises(ConfigError, match=r"redirects to 127\.0\.0\.1"):
            ask(server.url, "a", key=KEY)
        assert thief.headers == []
        assert "Authorization" in server.headers[0], "the control: the key went where it belongs"
        assert ask(thief.url, "a")[0].text == "stolen", "the control: the other server does answer"


def test_the_newer_name_of_the_limit_is_tried() -> None:
    """By all threads, each of which may have asked by the older name before one of them was told."""
    said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    together = threading.Barrier(3)

    def answer(prompt: str, before: int) -> Answer | str:
        if "max_completion_tokens" in server.bodies[before]:
            return "x"
        together.wait(5)
        return refusal(400, said)

    with StandIn(answer) as server:
        assert [reply.text for reply in ask(server.url, *"abcde", concurrency=3)] == ["x"] * 5
    assert sum("max_tokens" in body for body in server.bodies) == 3
    with StandIn(lambda prompt, before: refusal(400, said)) as server:
        assert "max_completion" in ask(server.url, "a")[0].text
    assert len(server.bodies) == 2, "asked so once, too"


def test_no_wait_at_all_is_none_to_be_asked_for() -> None:
    """Retry-After: 0 does not shorten the pauses."""
    limits = Limits(pauses=(0.2, 0.2))
    with StandIn(lambda prompt, before: refusal(429, Retry_After="0")) as server, pytest.raises(HubError):
        ask(server.url, "a", limits=limits)
    assert server.at[2] - server.at[0] > 0.3


@pytest.mark.parametrize(
    "location", ["//[", "http://a]b/", "/x", f"http://{KEY}.org", f"http://me:{KEY[:12]}@evil.org/"]
)
def test_where_a_redirect_goes_may_be_nonsense(location: str) -> None:
    with (
        StandIn(lambda prompt, before: refusal(302, Location=location)) as server,
        pytest.raises(ConfigError, match="redirects to") as caught,
    ):
        ask(server.url, "a", key=KEY)
    assert KEY[:12] not in str(caught.value)


# --- addresses and keys -----------------------------------------------------------------------------------------------


def connect(url: str, key_env: str | None = None) -> endpoint.Endpoint:
    return endpoint.connect(url, "tiny", key_env=key_env, concurrency=2)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.0.0.1:8000/v1/", "http://[::1]:8000/v1"])
def test_this_machine_needs_no_key_and_gets_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert connect(url).key is None
    assert connect(url, "OPENAI_API_KEY").key == KEY
    assert connect("http://127.0.0.1:1/v1/chat/completions/").url == "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    "host", ["example.org", "localhost.example.org", "127.0.0.1.example.org", "10.0.0.1", "0.0.0.0"]
)
def test_a_key_does_not_cross_the_network_in_clear(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match="not encrypted") as caught:
        connect(f"http://{host}/v1")
    assert KEY not in str(caught.value)
    assert connect(f"https://{host}/v1").key == KEY
    assert connect(f"http://{host}/v1", "none").key is None


def test_a_missing_key_is_a_missing_login(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"OPENAI_API_KEY.*--key-env none"):
        connect("https://example.org/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(ConfigError, match="is no key") as caught:
        connect("https://example.org/v1")
    assert "two words" not in str(caught.value)


def test_a_key_in_place_of_its_variable_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="no name of an environment variable") as caught:
        connect("https://example.org/v1", KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["", "example.org/v1", "ftp://example.org", "https://", "https://[::1", "https://me:secretsecret@example.org/v1",
     "https://example.org/v1?key=secretsecret", "https://example.org/v1#secretsecret", "https://exa mple.org", "https://a\x1b.org",
     "https://example.org:port/", "https://example..org/v1?key=secretsecret",
     "https://example.org/v1?", f"https://{'a' * 64}.org/v1", "https://exa_mple..org/v1"],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(url, "none")
    assert "secretsecret" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks9://127.0.0.1:1080"), ("HTTPS_PROXY", "ftp://me:secretsecret@x"), ("SSL_CERT_FILE", "/nonexistent.pem")],
)  # fmt: skip
def test_a_broken_environment_is_said_before_anything(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as caught:
        answering.check(Asking(url="https://example.org/v1", endpoint_model="tiny", key_env="none"))
    assert "secretsecret" not in str(caught.value)


def test_a_host_that_nothing_refuses_before_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no address"):
        answering.check(Asking(url="https://xn--/v1", endpoint_model="tiny", key_env="none"))


def test_a_proxy_is_for_what_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn(lambda prompt, before: "x") as gone:
        nobody = gone.url.removesuffix("/v1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", nobody)
    monkeypatch.setenv("http_proxy", nobody)
    with StandIn(lambda prompt, before: "x") as server:
        assert ask(server.url, "a")[0].text == "x"
    with pytest.raises(HubError, match="or at the proxy"):
        ask("http://far.invalid/v1", "a")


def test_offline_sends_nothing_away() -> None:
    answering.check(Asking(url="http://127.0.0.1:9/v1", endpoint_model="tiny", offline=True))
    with pytest.raises(ConfigError, match="--offline"):
        answering.check(Asking(url="https://example.org/v1", endpoint_model="tiny", key_env="none", offline=True))


def test_the_key_is_no_part_of_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    where = connect("https://example.org/v1", "MY_KEY")
    assert where.key == KEY
    assert KEY not in repr(where) + str(where.identity()) + where.name
    assert errors.safe(f"refused: {KEY}") == "refused: ***", "whatever quotes it, such as a crash log"
    monkeypatch.setenv("MY_KEY", "shortkey")
    assert errors.safe("refused: shortkey") == "refused: ***"


@pytest.mark.parametrize("key", [KEY, KEY[:10]], ids=["long", "short"])
def test_a_key_anywhere_in_an_answer_reaches_nobody(key: str) -> None:
    with StandIn(lambda prompt, before: echo(f"Bearer {key}")) as server:
        [reply] = ask(server.url, "a", key=key)
    assert reply == Reply("Bearer ***", "content_filter")
    assert server.headers[0]["Authorization"] == f"Bearer {key}"


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with StandIn(lambda prompt, before: "x") as server:
        ask(server.url, *"abcdef", concurrency=4)
    time.sleep(0.1)
    assert threading.active_count() <= before
