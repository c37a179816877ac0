"""Another model answers when the one that was asked cannot: the chain that manifests' `fallback` makes.

Does: find the next model of a chain, run a request there, mark the answer and count it.
Leaves out: when a model cannot answer (agent.models, providers.instance), requests as such (agent.infer).

Rules
 * Only a model that is overloaded or unavailable is stood in for. A request that is wrong, ran out of time, or
   failed in the run gets its own error: another model would not make it right.
 * The answer says who answered (`model_name`) and for whom (`parameters.fallback_from`). The request is held
   against the metadata of the model that answers, and cached under that model's digest.
 * A chain has an end: MAX_CHAIN stand-ins, and none twice. What breaks this is refused when it is used, because
   only then all of its manifests are known.
 * While nobody is overloaded none of this costs anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from agent.infer import Exchange, Plan, patience_s
from agent.version import Asleep
from skerry.errors import DeadlineExceeded, NotFound, SkerryError, Unavailable

if TYPE_CHECKING:
    import asyncio

    from agent.infer import Client
    from agent.models import ModelTable
    from agent.tracing import Tracing
    from agent.version import Version
    from store.cache import OutputCache

#: Models that may be tried after the one that was asked.
MAX_CHAIN = 4


class Chain:
    """Who may answer in a version's place, one after the other. Of one request.

    Attributes:
        asked: the version that the request was for.
    """

    def __init__(self, models: ModelTable, asked: Version) -> None:
        self._models = models
        self.asked = asked
        self._tried = [asked.name]
        self._last = asked
        self._counted = False

    def following(self, error: SkerryError) -> Version:
        """The next one that is loaded.

        Args:
            error: why the one before cannot answer.

        Raises:
            SkerryError: `error`, if another model would not help or there is none.
            Asleep: the next one has to be waited for; asked again, it is next again.
            Unavailable: the chain leads back, or is too long.
        """
        if not isinstance(error, Unavailable) or isinstance(error, DeadlineExceeded):
            raise error
        while name := self._last.entry.manifest.fallback:
            self._check(name)
            try:
                found = self._models.find(name, None)
            except NotFound:
                raise Unavailable(
                    f"{error.message}; its fallback {name!r} is no model of this node",
                    "add that model, or a version without it",
                ) from None
            except Asleep:
                raise
            except Unavailable:
                self.pass_over(self._models.get(name, None))
            else:
                self.pass_over(found)
                return found
        raise error

    def at_once(self, error: SkerryError) -> Version:
        """As `following`, for a request that cannot wait any more: who is asleep is woken for the next one."""
        try:
            return self.following(error)
        except Asleep as asleep:
            self._models.wake(asleep.version)
            raise error from None

    def pass_over(self, version: Version) -> None:
        """This one has had its chance; after it comes its own fallback."""
        self._last = version
        self._tried.append(version.name)

    def count(self) -> None:
        """The request goes to a fallback: counted once, however many of them are tried."""
        self.asked.stats.fallbacks += not self._counted
        self._counted = True

    def _check(self, name: str) -> None:
        path = " -> ".join([*self._tried, name])
        if name in self._tried:
            raise Unavailable(
                f"model {self.asked.label}: expected a chain of fallbacks that ends, got {path}",
                "add a version with another `fallback`",
            )
        if len(self._tried) > MAX_CHAIN:
            raise Unavailable(
                f"model {self.asked.label}: expected at most {MAX_CHAIN} fallbacks, got {path}",
                "add a version with a shorter chain",
            )

    def run(  # noqa: PLR0913, PLR0917 - what an Exchange was given to start with
        self,
        exchange: Exchange,
        error: SkerryError,
        body: memoryview,
        header_bytes: int,
        scope: str,
        cache: OutputCache | None,
    ) -> SkerryError | None:
        """Have the next model run a request that could not be queued.

        Returns: None if the request is under way there; else the error to answer with.
        """
        try:
            version = self.at_once(error)
        except SkerryError as refusal:
            return refusal
        kept = memoryview(bytes(body))  # it may lie in memory that goes back to the model that was asked
        self.hand_over(exchange, version).start(kept, header_bytes, scope, cache)
        return None

    def hand_over(self, exchange: Exchange, version: Version) -> StandIn:
        """The exchange that goes on with this version in place of one that was not queued."""
        loop, client = exchange.step_aside()
        stand_in = StandIn(version, loop, client, self)
        client.continued(stand_in)
        return stand_in


class StandIn(Exchange):
    """A request that runs on another model than it asked for."""

    __slots__ = ("_asked_chain",)

    def __init__(
        self, version: Version, loop: asyncio.AbstractEventLoop, client: Client, chain: Chain
    ) -> None:
        super().__init__(version, loop, client)
        self._asked_chain = chain
        chain.count()

    def chain(self) -> Chain:
        """The one that the request came along."""
        return self._asked_chain

    def _plan_for(self, header: bytes, binary_bytes: int) -> Plan:
        plan = self._make_plan(header, binary_bytes)  # not one that is remembered: its answers are marked
        plan.parameters = {"fallback_from": self._asked_chain.asked.label}
        return plan


class Served(Protocol):
    """What requests are opened with.

    Attributes:
        models: the table.
        tracing: makes the exchanges of requests that run where they were sent.
    """

    models: ModelTable
    tracing: Tracing


def receive_into(exchange: Exchange, body_bytes: int, header_bytes: int) -> memoryview:
    """As Exchange.receive_into; where its model has no room, that of one that answers in its place.

    Its client is told which exchange goes on.

    Raises:
        TooLarge: there will never be room for so much.
        Unavailable: there is no room now, and no fallback.
    """
    while True:
        try:
            return exchange.receive_into(body_bytes, header_bytes)
        except Unavailable as error:
            chain = exchange.chain()
            if chain is None:
                raise
            exchange = chain.hand_over(exchange, chain.at_once(error))


def open_exchange(
    served: Served, name: str, number: int | None, loop: asyncio.AbstractEventLoop, client: Client
) -> Exchange:
    """Begin a request: with the model it asks for, or with one that answers in its place.

    Raises:
        NotFound: no such model or version.
        Asleep: somebody has to be waited for first: `open_later`.
        Unavailable: neither it nor a fallback answers now.
    """
    models = served.models
    try:
        return served.tracing.exchange(models.find(name, number), loop, client)
    except Asleep:
        raise
    except Unavailable as error:
        chain = Chain(models, models.get(name, number))
        return StandIn(chain.following(error), loop, client, chain)


async def open_later(  # noqa: PLR0913, PLR0917 - as above, and what the request says of its time
    served: Served,
    name: str,
    number: int | None,
    loop: asyncio.AbstractEventLoop,
    client: Client,
    header: bytes,
) -> Exchange:
    """Begin a request as `open_exchange` does, and wait for whoever has to be loaded for it.

    The wait ends when the time is up that the request's JSON gives it, in any case the model's own limit.

    Args:
        served: as above.
        name: of the model that is asked for.
        number: of its version; None for the one that serves.
        loop: as for an Exchange.
        client: likewise.
        header: the request's JSON; empty if nobody has read it yet.

    Raises:
        InvalidRequest: what there is of the request makes no sense.
        NotFound: no such model or version.
        Unavailable: it could not be loaded, or not in time, and no fallback answers.
    """
    models = served.models
    asked = models.get(name, number)
    patience = patience_s(header, asked.timeout_s)
    until = loop.time() + patience
    try:
        return served.tracing.exchange(await models.ready(name, number, patience), loop, client)
    except Unavailable as error:
        chain = Chain(models, asked)
        while True:
            try:
                return StandIn(chain.following(error), loop, client, chain)
            except Asleep as asleep:
                if asleep is error:  # the one that was asked, and nobody is left who would answer instead
                    raise
                next_one = asleep.version
            try:
                await models.ready(next_one.name, None, until - loop.time())
            except Unavailable:
                chain.pass_over(next_one)
