"""One inference from its bytes to its answer: plan, cache, queue, run, record.

Does: everything between "the body is here" and "this is the answer", for whatever carried it.
Leaves out: HTTP (agent.ipc.http), which versions there are (agent.models), the run itself (providers.instance).

Rules
 * What a JSON header decides is decided once: clients repeat their header and change only the tensors, so the
   outcome of parsing and checking is remembered per version as a Plan.
 * The version is leased from before its memory is touched until the answer has been built.
 * Every request that was counted in is counted out, with exactly one outcome.
 * Of a model that remembers answers, requests for the same one make one run (agent.flights). They share its answer and
   a fault of the model; where it was only stopped or turned away, those that followed it go on by themselves.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from agent.sharing import Shared
from agent.states import State
from providers.area import ALIGNMENT
from providers.job import Job, RequestLayout
from providers.queue import DEFAULT_LEVEL, LEVELS
from skerry import oip
from skerry.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    SkerryError,
    TooLarge,
)
from skerry.terms import KIB, MIB
from store import cachekey
from store.cache import MAX_ANSWER_BYTES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping

    from agent.fallback import Chain
    from agent.flights import Flight, Request
    from agent.sharing import Registered
    from agent.version import Version
    from providers import wire
    from providers.instance import Instance
    from providers.job import ResultLayout
    from skerry.terms import TensorView
    from store.cache import OutputCache

#: Plans remembered per version, and the longest header worth remembering.
MAX_PLANS = 256
MAX_PLANNED_HEADER_BYTES = 4 * KIB
#: The JSON of a request at most. Numbers as JSON take some twenty times their size in memory while they are
#: read, and the daemon's one loop reads them; what is larger goes as binary.
MAX_JSON_BYTES = 16 * MIB
#: Room for outputs at most. Larger answers come in memory of their own.
MAX_ROOM_BYTES = 16 * MIB
_ANY_DEADLINE_US = 10**12


class Plan:
    """All that a JSON header says, checked against the version it is for."""

    __slots__ = (
        "answer_json",
        "answer_layout",
        "binary_bytes",
        "cache_prefix",
        "cached_json",
        "cached_layout",
        "form",
        "has_bytes",
        "header",
        "inferences",
        "layout",
        "lendable",
        "parameters",
        "priority",
        "regions",
        "tail",
        "timeout_s",
        "total_bytes",
    )

    def __init__(
        self,
        version: Version,
        request: oip.InferRequest,
        inputs: oip.Inputs,
        binary_bytes: int,
        find: Callable[[str], Registered] | None = None,
    ) -> None:
        oip.check_inputs(version.label, version.inputs, inputs.views)
        self.form = oip.response_format(request, version.label, version.outputs)
        self.regions: tuple[Registered, ...] = ()  # of whoever asks, by the names that the request gives
        if find is not None and (inputs.places or self.form.places):
            shared = Shared(inputs, self.form, find)
            self.regions = shared.used
            self.layout = RequestLayout(shared.tensors, self.form.outputs, shared.regions, shared.targets)
        else:
            self.layout = version.layout_of(inputs.views, self.form.outputs)
        self.inferences = max(1, self.layout.rows) if version.max_batch > 1 else 1
        self.binary_bytes = binary_bytes
        self.tail = inputs.tail
        self.total_bytes = binary_bytes + len(inputs.tail)
        self.has_bytes = any(view.datatype == "BYTES" for view in inputs.views)
        self.header: oip.Header | None = None  # under which it is remembered
        self.lendable = True  # no worker has failed at such a request on a lent connection
        self.timeout_s = _timeout_s(request.parameters, version.timeout_s)
        self.priority = _priority(request.parameters)
        self.cache_prefix: dict[str, tuple[bytes, tuple[TensorView, ...]]] = {}  # by scope
        self.parameters: dict[str, Any] = {}  # of the answer
        self.answer_layout: ResultLayout | None = None
        self.answer_json = b""
        self.cached_layout: tuple[TensorView, ...] | None = None
        self.cached_json = b""


class Client(Protocol):
    """Who asked: `owner` is the uid, -1 if nobody knows. Owners share a model fairly.

    One of the first two is called, once, unless the exchange was abandoned.
    """

    @property
    def owner(self) -> int:
        """Uid."""

    def answer(self, json: bytes, parts: list[memoryview], release: Callable[[], None]) -> None:
        """The JSON, the binary tensors behind it, and what to call when their memory is no longer needed."""

    def refuse(self, error: SkerryError) -> None:
        """There is no answer."""

    def find_region(self, name: str) -> Registered:
        """The shared memory that whoever asks has registered under this name."""

    def continued(self, exchange: Exchange) -> None:
        """From now on `exchange` is the one to abandon: another model answers."""


def _timeout_s(parameters: Mapping[str, Any], longest_s: float) -> float:
    """Triton's request parameter `timeout` is in microseconds; 0 and absent mean the model's own limit."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _ANY_DEADLINE_US:
        raise InvalidRequest(f"parameter 'timeout': expected microseconds, got {value!r}")
    return min(longest_s, value / 1e6) if value else longest_s


def patience_s(header: bytes, longest_s: float) -> float:
    """How long a request may take, by the JSON that it begins with; `longest_s` if that says nothing.

    Raises:
        InvalidRequest: it is no JSON of a request.
    """
    return _timeout_s(oip.decode_request(header).parameters, longest_s) if header else longest_s


def _priority(parameters: Mapping[str, Any]) -> int:
    """Triton's request parameter `priority`: 1 goes first, 0 and absent mean the default."""
    value = parameters.get("priority", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LEVELS:
        raise InvalidRequest(
            f"parameter 'priority': expected 0 (the default) or 1 to {LEVELS}, got {value!r}"
        )
    return value or DEFAULT_LEVEL


class Exchange(Job):
    """One request in progress. It ends with a call of its client, or by `abandon`.

    Args:
        version: what answers; a lease is held until the end.
        loop: the event loop.
        client: is told how it ended.

    Attributes:
        version: who answers it.
        plan: what its JSON says; there once the request has started.
        request_id: its own, or empty.
    """

    __slots__ = (
        "_begun_ns",
        "_block",
        "_client",
        "_done",
        "_flight",
        "_instance",
        "_key",
        "_loop",
        "_submitted",
        "plan",
        "request_id",
        "version",
    )

    def __init__(self, version: Version, loop: asyncio.AbstractEventLoop, client: Client) -> None:
        self.version = version
        self._loop = loop
        self._client: Client | None = client
        self.owner = client.owner
        self._begun_ns = version.used_ns = time.perf_counter_ns()
        self._instance: Instance | None = None
        self._block = -1
        self._done: wire.Done | None = None  # no run: answered from the cache, or not at all
        self._submitted = False
        self._key: bytes | None = None
        self._flight: Flight | None = None  # that it leads or follows
        self.request_id = ""
        version.acquire()

    # -- receiving

    def receive_into(self, body_bytes: int, header_bytes: int) -> memoryview:
        """Shared memory in which the whole body can be received, so that its tensors need no copy.

        Args:
            body_bytes: of the HTTP body.
            header_bytes: of the JSON in front; the tensors behind it come to lie at an aligned offset.

        Raises:
            TooLarge: there will never be room for so much.
            Overloaded: no room now.
        """
        instance = self.version.require_instance()
        pad = -header_bytes % ALIGNMENT
        offset, _ = instance.area.take(pad + body_bytes + ALIGNMENT + self.version.room_bytes)
        self._instance, self._block = instance, offset
        return instance.area.memory[offset + pad : offset + pad + body_bytes]

    # -- running

    def start(self, body: memoryview, header_bytes: int, scope: str, cache: OutputCache | None) -> None:
        """Run the request whose body is complete. Never raises: whatever goes wrong is the reply."""
        try:
            self._start(body, header_bytes, scope, cache)
        except SkerryError as error:
            self._land()
            chain = self.chain()
            problem = error if chain is None else chain.run(self, error, body, header_bytes, scope, cache)
            if problem is not None:
                self.fail(problem)

    def chain(self) -> Chain | None:
        """Who may answer instead."""
        return self.version.fallbacks()

    def turn_away(self) -> None:
        """Its user has too many: nothing happens, and whoever asks for this tells the client."""
        self._client = None
        self.version.stats.rejected += 1
        self._let_go()

    def step_aside(self) -> tuple[asyncio.AbstractEventLoop, Client]:
        """Let go before anything was queued: another exchange goes on for this loop and client."""
        client, self._client = self._client, None
        assert client is not None  # noqa: S101 - nobody has answered it yet
        self._let_go()
        return self._loop, client

    def _start(self, body: memoryview, header_bytes: int, scope: str, cache: OutputCache | None) -> None:
        version = self.version
        if header_bytes > MAX_JSON_BYTES:
            raise TooLarge(
                f"inference request: expected at most {MAX_JSON_BYTES} bytes of JSON, got {header_bytes}",
                "send large tensors as binary: parameters.binary_data_size",
            )
        binary = body[header_bytes:]
        plan = self._plan_for(bytes(body[:header_bytes]), len(binary))
        self.plan = plan
        if plan.has_bytes:
            _check_bytes(plan, binary)
        if (
            cache is not None
            and version.cache_policy is not None
            and not plan.regions
            and self._answer_from(cache, plan, binary, scope)
        ):
            return
        instance = self._instance
        if instance is None or plan.tail:
            if self._block >= 0:
                # It lies in the block, which may be emptied once it is given back.
                binary = memoryview(bytes(binary))
                self._give_block()
            instance = self._instance = version.require_instance()
            begin, size = instance.area.take(plan.total_bytes + ALIGNMENT + version.room_bytes)
            self._block = begin
            memory = instance.area.memory
            memory[begin : begin + plan.binary_bytes] = binary
            if plan.tail:
                memory[begin + plan.binary_bytes : begin + plan.total_bytes] = plan.tail
            end = begin + size
        elif version.instance is not instance:  # it was given up while the body came
            raise version.unavailable()
        else:
            begin = self._block + header_bytes + -header_bytes % ALIGNMENT
            end = self._block + instance.area.block_bytes(self._block)
        room = -(-(begin + plan.total_bytes) // ALIGNMENT) * ALIGNMENT
        self.layout = plan.layout
        self.begin = begin
        self.room = room
        self.room_bytes = end - room
        self.priority = plan.priority
        self.deadline = self._loop.time() + plan.timeout_s
        self._run_or_follow(instance)

    def _run_or_follow(self, instance: Instance) -> None:
        version = self.version
        if self._key is not None:
            flight = self._flight = version.flights.join(self._key, self)
            if flight is not None and flight.leader is not self:
                return
            version.stats.cache_misses += 1
            version.stats.cache_miss_us += (time.perf_counter_ns() - self._begun_ns) // 1000
        instance.submit(self)
        self._submitted = True

    def go_on_alone(self) -> None:
        """See agent.flights.Request."""
        try:
            instance, version = self._instance, self.version
            if instance is None or version.instance is not instance or version.state is State.UNLOADING:
                raise version.unavailable()
            self._run_or_follow(instance)
        except SkerryError as error:
            self.on_error(error)

    def _land(self) -> list[Request]:
        """It leads nobody any more; returns who has followed it."""
        flight, self._flight = self._flight, None
        return self.version.flights.end(flight) if flight is not None and flight.leader is self else []

    def _plan_for(self, json: bytes, binary_bytes: int) -> Plan:
        version = self.version
        header, request_id = oip.cut_id(json)
        if header is not None:
            plan = version.plans.get(header)
            if plan is not None and plan.binary_bytes == binary_bytes and self._may_use(plan):
                self.request_id = request_id
                return plan
        plan = self._make_plan(json, binary_bytes)
        # One with data is its own tensor, and will not be seen again.
        if (
            header is not None
            and request_id == self.request_id
            and not plan.tail
            and 0 < len(json) <= MAX_PLANNED_HEADER_BYTES
        ):
            if len(version.plans) >= MAX_PLANS:
                version.plans.clear()
            plan.header = header
            version.plans[header] = plan
        return plan

    def _may_use(self, plan: Plan) -> bool:
        """Whether the shared memory that the plan was made for is still what this user calls so."""
        client = self._client
        return not plan.regions or (
            client is not None and all(client.find_region(used.name) is used for used in plan.regions)
        )

    def _make_plan(self, header: bytes, binary_bytes: int) -> Plan:
        version = self.version
        if header:
            request = oip.decode_request(header)
            inputs = oip.locate_inputs(request, binary_bytes)
        else:
            view = oip.sole_input(version.label, version.inputs, binary_bytes)
            request = oip.InferRequest([], parameters={"binary_data_output": True})
            inputs = oip.Inputs((view,), b"")
        self.request_id = request.id or ""
        find = None if self._client is None else self._client.find_region
        return Plan(version, request, inputs, binary_bytes, find)

    def _answer_from(self, cache: OutputCache, plan: Plan, binary: memoryview, scope: str) -> bool:
        version = self.version
        if version.cache_policy == "shared":
            scope = "shared"
        views = plan.layout.tensors
        body = memoryview(bytes(binary) + plan.tail) if plan.tail else binary
        known = plan.cache_prefix.get(scope)
        if known is None:
            prefix = cachekey.prefix(version.digest, views, plan.form.outputs, {}, scope)
            known = plan.cache_prefix[scope] = prefix, cachekey.in_order(views)
        self._key = cachekey.digest(*known, body)
        found = cache.get(self._key)
        if found is None:
            return False
        self.answer_again(found.layout, found.payload)
        return True

    def answer_again(self, layout: tuple[TensorView, ...], answer: bytes) -> None:
        """Answer with what another request got. See agent.flights.Request."""
        self._flight = None
        version, plan = self.version, self.plan
        stats = version.stats
        stats.cache_hits += 1
        stats.cache_hit_us += (time.perf_counter_ns() - self._begun_ns) // 1000
        payload = memoryview(answer)
        if layout is plan.cached_layout:
            json, parts = plan.cached_json, [payload]
        else:
            json, parts = oip.encode_response(
                version.name,
                version.number_text,
                layout,
                payload,
                plan.form,
                parameters=plan.parameters | {"cached": True},
                labels=version.entry.manifest.classes,
            )
            if _is_all_binary(plan, parts, layout):
                plan.cached_layout, plan.cached_json = layout, json
        self._succeed(json, parts)

    # -- ending

    def abandon(self) -> None:
        """The client is gone: nothing will be sent; what is queued is dropped, what runs is stopped."""
        self._client = None
        flight = self._flight
        if flight is not None and flight.leader is self and flight.followers:
            return  # they want its answer
        if flight is not None and flight.leader is not self:
            flight.followers.remove(self)
            if not flight.followers:
                flight.leader.left_alone()
        if self._submitted and self._instance is not None:
            self._instance.cancel(self)  # on_error is called, and lets go of everything
        else:
            self.version.stats.canceled += 1
            self._let_go()

    def on_result(self, memory: memoryview, at: int, layout: ResultLayout, done: wire.Done) -> None:
        """The run is over. See Job."""
        version = self.version
        plan = self.plan
        stats = version.stats
        self._done = done
        if done[2]:
            stats.ran(*done[2:])
        if layout.size_bytes > version.room_bytes:
            version.room_bytes = min(layout.size_bytes, MAX_ROOM_BYTES)
        payload = memory[at : at + layout.size_bytes]
        if plan.answer_layout is not layout and not _is_answer_to(plan, version, layout):
            self.on_error(InternalError(f"model {version.label}: its worker answered with other outputs"))
            return
        if self._key is not None and (self._flight is not None or layout.size_bytes <= MAX_ANSWER_BYTES):
            self._share(layout.tensors, bytes(payload))
        if self._client is None:
            stats.canceled += 1
            self._let_go()
        elif plan.answer_layout is layout:
            self._succeed(plan.answer_json, [payload] if layout.size_bytes else [])
        else:
            self._encode(plan, layout, payload)

    def _share(self, tensors: tuple[TensorView, ...], answer: bytes) -> None:
        if self._key is not None and len(answer) <= MAX_ANSWER_BYTES:
            self.version.remember(self._key, tensors, answer)
        for follower in self._land():
            try:
                follower.answer_again(tensors, answer)
            except SkerryError as error:  # it wants it in a form that does not carry it
                follower.fail(error)

    def on_error(self, error: SkerryError) -> None:
        """The run came to nothing. See Job."""
        followers = self._land()
        self.fail(error)
        for follower in followers:
            if isinstance(error, DeadlineExceeded | Overloaded):
                follower.go_on_alone()
            else:
                follower.fail(error)

    def on_late(self, error: SkerryError) -> None:
        """Answer now; the memory stays the worker's until it is done with it. See Job."""
        client, self._client = self._client, None
        for follower in self._land():
            follower.go_on_alone()
        if client is not None:
            client.refuse(error)

    def left_alone(self) -> None:
        """See agent.flights.Request."""
        if self._client is None:
            self.abandon()

    def _encode(self, plan: Plan, layout: ResultLayout, payload: memoryview) -> None:
        version = self.version
        try:
            json, parts = oip.encode_response(
                version.name,
                version.number_text,
                layout.tensors,
                payload,
                plan.form,
                parameters=plan.parameters,
                labels=version.entry.manifest.classes,
            )
        except SkerryError as error:
            self.fail(error)
            return
        if _is_all_binary(plan, parts, layout.tensors):
            plan.answer_layout, plan.answer_json = layout, json
        self._succeed(json, parts)

    def _succeed(self, json: bytes, parts: list[memoryview]) -> None:
        stats = self.version.stats
        stats.success += 1
        now_ns = time.perf_counter_ns()
        took_us = (now_ns - self._begun_ns) // 1000
        stats.request_us += took_us
        stats.latency.record(took_us)
        if self._done is not None:
            _, _, _, input_ns, infer_ns, output_ns = self._done
            stats.last_run_ns = now_ns
            stats.inference_count += self.plan.inferences
            stats.compute_input_ns += input_ns
            stats.compute_infer_ns += infer_ns
            stats.compute_output_ns += output_ns
            stats.queue_us += max(0, took_us - (input_ns + infer_ns + output_ns) // 1000)
        client = self._client
        assert client is not None  # noqa: S101 - an abandoned exchange does not come here
        if self.request_id:
            json = oip.with_id(json, self.request_id)
        client.answer(json, parts, self._let_go)

    def fail(self, error: SkerryError) -> None:
        """Count it and tell the client. See agent.flights.Request."""
        self._flight = None
        stats = self.version.stats
        stats.fail_us += (time.perf_counter_ns() - self._begun_ns) // 1000
        if isinstance(error, Overloaded):
            stats.rejected += 1
        elif self._client is None or isinstance(error, DeadlineExceeded):
            stats.canceled += 1
        else:
            stats.failed += 1
        client = self._client
        self._let_go()
        if client is not None:
            client.refuse(error)

    def _let_go(self) -> None:
        if self._block >= 0:
            self._give_block()
        self.version.release()

    def _give_block(self) -> None:
        if self._instance is not None and self._block >= 0:
            self._instance.area.give(self._block)
            self._block = -1


def _is_all_binary(plan: Plan, parts: list[memoryview], outputs: tuple[TensorView, ...]) -> bool:
    """Whether the payload goes out as it lies: next time nothing is left to encode."""
    return len(parts) + len(plan.form.places) == len(outputs) and not plan.form.classes


def _is_answer_to(plan: Plan, version: Version, layout: ResultLayout) -> bool:
    """Whether these are the outputs that were asked for: a worker says so, and is not to be believed."""
    wanted = plan.form.outputs or tuple(spec.name for spec in version.outputs)
    return wanted == tuple(view.name for view in layout.tensors)


def _check_bytes(plan: Plan, binary: memoryview) -> None:
    for view in plan.layout.tensors:
        if view.datatype == "BYTES" and view.offset + view.size_bytes <= plan.binary_bytes:
            oip.check_bytes_tensor(view, binary[view.offset : view.offset + view.size_bytes])
