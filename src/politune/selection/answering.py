"""Who answers: a model on this machine, by the same loader as a measurement, or an endpoint; and what it will cost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from politune.errors import ConfigError, HubError, ModelError, safe
from politune.lean import papers
from politune.lean.prompts import Prompter
from politune.models import load, tuned
from politune.models.writer import AT_ONCE
from politune.progress import Phase
from politune.report import Cell, Facts, Section
from politune.selection import endpoint
from politune.selection.endpoint import CUT_OFF, REJECTED, STOPPED, Replied, Request, Settings
from politune.selection.replies import Kept, Replies

REJECTED_IN_A_ROW = 3
"""So many requests that an endpoint rejects before it answers any are not the fault of one of them."""
CHARACTERS_PER_TOKEN = 4
"""Of English, about; said to be an estimate wherever it is used."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asking:
    """Who is to answer, as the user names it: `model`, or `url` and `endpoint_model`.

    Args:
        model: a run, an adapter, a checkpoint, a Hub id, or `demo`.
        url: of an endpoint.
        endpoint_model: its name there.
        key_env: the environment variable with the key.
        concurrency: requests to the endpoint at a time.
        price_in, price_out: money per million tokens of prompts and of answers, in whatever currency.
        offline: use only what is on this machine.
    """

    model: str | None = None
    url: str | None = None
    endpoint_model: str | None = None
    key_env: str | None = None
    concurrency: int = 4
    price_in: float | None = None
    price_out: float | None = None
    offline: bool = False


class Answering(Protocol):
    """A model that answers."""

    @property
    def name(self) -> str:
        """As reports have it."""

    @property
    def generator(self) -> str:
        """As data have it that it wrote: the model, wherever it was asked."""

    def identity(self) -> dict[str, Any]:
        """All that its answers depend on, for the papers; no key is in it."""

    def answers(self, requests: Sequence[Request], settings: Settings) -> Iterator[list[Replied]]:
        """Replies in groups as they come."""


class LocalModel:
    """A model on this machine; its weights are loaded when it is first asked.

    Raises:
        ModelError, MachineError, HubError: there is no such model, or it cannot be brought here.
    """

    def __init__(self, model: str, *, offline: bool, say: Say) -> None:
        self.subject, self.say = tuned.subject(model), say
        self.base = load.resolve(self.subject.base, offline=offline, say=say)
        self.tokenizer = load.load_tokenizer(self.base)
        self._prompter = Prompter(self.tokenizer)
        self._identity: dict[str, Any] | None = None
        self._writer: Any = None

    @property
    def name(self) -> str:
        if self.subject.adapter is None:
            return self.base.public_name
        return f"{self.base.public_name}, tuned (declared direction: {self.subject.direction})"

    @property
    def generator(self) -> str:
        return self.name

    def identity(self) -> dict[str, Any]:
        if self._identity is None:
            self._identity = papers.describe(self.subject, self.base, self.tokenizer, self.subject.dtype)
        return self._identity

    def tokens(self, prompt: str) -> int:
        """Of a prompt, with all that the chat template puts around it."""
        return len(self._prompter.opening(prompt).context)

    def answers(self, requests: Sequence[Request], settings: Settings) -> Iterator[list[Replied]]:
        """Replies by so many; those of one length stand together, because the writer pads nothing.

        What is drawn depends on who is written together with whom: groups are cut in the same order whatever was answered
        before, if that were whole groups.
        """
        contexts = {request: self._prompter.opening(request.prompt).context for request in requests}
        self._require_room(max(map(len, contexts.values())), settings.max_new_tokens)
        ordered = sorted(requests, key=lambda request: len(contexts[request]))
        for start in range(0, len(ordered), AT_ONCE):
            group = ordered[start : start + AT_ONCE]
            written = self._loaded().written(
                [contexts[request] for request in group],
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=f"{group[0].seed} {len(group)} {group[0].prompt}",
            )
            yield [
                (
                    request,
                    endpoint.Reply(each.text, STOPPED if each.ended else CUT_OFF, len(contexts[request]), each.tokens),
                )
                for request, each in zip(group, written, strict=True)
            ]

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _loaded(self) -> Any:
        if self._writer is None:
            from politune.lean import respondent

            loaded = respondent.load(self.subject, self.base, self.tokenizer, self.subject.dtype, self.say)
            self._writer = loaded.writer
        return self._writer

    def _require_room(self, longest: int, max_new_tokens: int) -> None:
        room = self.base.config.get("max_position_embeddings")
        if isinstance(room, int) and longest + max_new_tokens > room:
            raise ModelError(
                f"the longest prompt has {longest:,} tokens, {max_new_tokens} more may follow, and the model takes {room:,}",
                fix="take a model with a longer context, or leave out the longest rows",
            )


def check(asking: Asking) -> None:
    """All of it that can be refused before any data is read, or a model looked for.

    Raises:
        ConfigError: none or both of a model and an endpoint are named, or an address or a price is wrong.
        MachineError: the key is missing.
    """
    if (asking.model is None) == (asking.url is None):
        raise ConfigError("name who is to answer: --model, or --endpoint with --endpoint-model, and not both")
    if (asking.url is None) != (asking.endpoint_model is None):
        raise ConfigError("--endpoint and --endpoint-model belong together")
    if asking.model is not None and asking.key_env is not None:
        raise ConfigError("a local model needs no key", where="--key-env", fix="leave it out")
    for name, price in (("--price-in", asking.price_in), ("--price-out", asking.price_out)):
        if price is not None and not 0 <= price < 1e9:
            raise ConfigError(f"{price:g} is no price of a million tokens", where=name)
    if not 1 <= asking.concurrency <= endpoint.MOST_CONCURRENCY:
        raise ConfigError(f"--concurrency {asking.concurrency} is not between 1 and {endpoint.MOST_CONCURRENCY}")
    if asking.url is not None:
        found = _endpoint(asking, None)
        if asking.offline and not found.is_near:
            raise ConfigError(
                f"{safe(found.url)} is not on this machine, and rows would be sent there",
                where="--offline",
                fix="leave it out, or take --model",
            )
        found.client().close()


def who(asking: Asking, say: Say, *, limits: endpoint.Limits | None = None, dry_run: bool = False) -> Answering | None:
    """Who answers; None for a dry run with a model that is not on this machine.

    Raises:
        ConfigError, MachineError: what `check` raises.
        ModelError, HubError: there is no such model, or it cannot be brought here.
    """
    if asking.url is not None:
        return _endpoint(asking, limits)
    try:
        return LocalModel(asking.model or "", offline=asking.offline or dry_run, say=say)
    except HubError:
        if dry_run:  # nothing is fetched for a look at the cost
            return None
        raise


def _endpoint(asking: Asking, limits: endpoint.Limits | None) -> endpoint.Endpoint:
    return endpoint.connect(
        asking.url or "",
        asking.endpoint_model or "",
        key_env=asking.key_env,
        concurrency=asking.concurrency,
        limits=limits,
    )


def answer(
    requests: Sequence[Request], who: Answering, settings: Settings, replies: Replies, say: Say
) -> dict[Request, Kept]:
    """A reply to every request: those there are, those of the cache, and the rest from who answers, kept as they come.

    Raises:
        OutputError: the disk is full.
        PolituneError: what `who` raises; everything that was answered is kept.
    """
    distinct = list(dict.fromkeys(requests))
    shared = [(each, found.reply) for each in distinct if not replies.is_here(each) and (found := replies.find(each))]
    if shared:
        replies.keep(shared, cached=True)
    missing = [each for each in distinct if not replies.is_here(each)]
    if missing:
        told, done = Phase("asking", "answers", say), 0
        rejected: list[Replied] = []
        for group in who.answers(missing, settings):
            rejected += [each for each in group if each[1].finish == REJECTED]
            replies.keep([each for each in group if each[1].finish != REJECTED])
            done += len(group)
            if not replies.any_here and len(rejected) == min(len(missing), REJECTED_IN_A_ROW):
                raise ConfigError(f"{who.name} answers nothing", why=rejected[0][1].text)
            told(done, len(missing))
        if rejected:
            say(f"{len(rejected)} requests are left out, the first because {rejected[0][1].text}")
            replies.keep(rejected)
    return {each: found for each in distinct if (found := replies.find(each))}


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What is about to be asked, before it is.

    Args:
        what: is asked about: `rows` or `texts`.
        of: how many of those; `distinct` requests among them, of which `there` are answered already, here or in the cache.
        prompt_tokens, answer_tokens: of what is left to ask; the latter is a guess of its usual length.
        most_answer_tokens: where every answer is as long as it may be.
        exact: whether prompts were counted with the model's own tokenizer.
        money, most_money: at the given prices; None without them.
    """

    who: str
    what: str
    of: int
    distinct: int
    there: int
    prompt_tokens: int
    answer_tokens: int
    most_answer_tokens: int
    exact: bool
    money: float | None
    most_money: float | None

    @property
    def headline(self) -> str:
        return f"{self.who} is to answer {self.distinct - self.there:,} requests"

    def sections(self) -> Sequence[Section]:
        how = "counted with its tokenizer" if self.exact else f"an estimate: characters / {CHARACTERS_PER_TOKEN}"
        facts: list[tuple[str, Cell]] = [
            (self.what, self.of),
            ("distinct requests", self.distinct),
            ("answered already", self.there),
            ("prompt tokens", f"{self.prompt_tokens:,} ({how})"),
            ("answer tokens", f"about {self.answer_tokens:,}, at most {self.most_answer_tokens:,}"),
        ]
        if self.money is not None:
            facts.append(("money", f"about {self.money:,.4f}, at most {self.most_money:,.4f}; retries come on top"))
        return [Facts("Cost, before anything is asked", tuple(facts))]


def cost(
    requests: Sequence[Request],
    who: Answering | None,
    asking: Asking,
    settings: Settings,
    replies: Replies | None,
    *,
    what: str,
    of: int,
    usual_answer: str,
) -> Cost:
    """What asking will cost.

    Args:
        replies: what is there already; None: nothing is known of that.
        usual_answer: a text as long as an answer usually is.
    """
    distinct = list(dict.fromkeys(requests))
    missing = [each for each in distinct if replies is None or replies.find(each) is None]
    local = who if isinstance(who, LocalModel) else None
    prompt_tokens = sum(local.tokens(each.prompt) if local else _estimated(each.prompt) for each in missing)
    each_answer = local.count(usual_answer) if local else _estimated(usual_answer)
    answer_tokens, most = (
        len(missing) * min(n, settings.max_new_tokens) for n in (each_answer, settings.max_new_tokens)
    )
    return Cost(
        who.name if who else asking.model or "", what, of, len(distinct), len(distinct) - len(missing), prompt_tokens,
        answer_tokens, most, local is not None, money(asking, prompt_tokens, answer_tokens), money(asking, prompt_tokens, most),
    )  # fmt: skip


def _estimated(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def money(asking: Asking, prompt_tokens: int, answer_tokens: int) -> float | None:
    """What so many tokens cost; None without prices. A price that is not given is 0."""
    if asking.price_in is None and asking.price_out is None:
        return None
    return (prompt_tokens * (asking.price_in or 0.0) + answer_tokens * (asking.price_out or 0.0)) / 1e6


@dataclass(frozen=True)
class Spent:
    """What replies cost, those from the cache nothing. Tokens as who answered counts them, estimated where it does not say."""

    requests: int
    from_cache: int
    prompt_tokens: int
    answer_tokens: int
    money: float | None

    def facts(self) -> tuple[tuple[str, Cell], ...]:
        found: list[tuple[str, Cell]] = [
            ("requests", f"{self.requests:,}, and {self.from_cache:,} from the cache"),
            ("tokens", f"{self.prompt_tokens:,} of prompts, {self.answer_tokens:,} of answers"),
        ]
        if self.money is not None:
            found.append(("money", f"{self.money:,.4f}"))
        return tuple(found)


def spent(found: dict[Request, Kept], asking: Asking) -> Spent:
    """What these replies cost in this directory, over all the times that the command ran."""
    paid = [(q, kept.reply) for q, kept in found.items() if not kept.cached and kept.reply.finish != REJECTED]
    prompts = sum(_estimated(q.prompt) if r.prompt_tokens is None else r.prompt_tokens for q, r in paid)
    answers = sum(_estimated(r.text) if r.answer_tokens is None else r.answer_tokens for _, r in paid)
    return Spent(
        len(paid), sum(kept.cached for kept in found.values()), prompts, answers, money(asking, prompts, answers)
    )
