"""The calls: GRPCInferenceService and grpc.health.v1, each passed on to the daemon for whoever made it.

Does: who asks, in which form, with which limit; errors as status codes, or as messages in a stream.
Leaves out: messages (agent.rpc.codec, agent.rpc.pages), the order in a stream (agent.rpc.stream), the way to the daemon
(agent.rpc.link).

Rules
 * Nothing is decided here that the daemon decides: a call is asked in the name of its client's uid.
 * A call that ends early, by its deadline or its caller, ends what it asked of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from typing import TYPE_CHECKING, Any

import grpc
from msgspec import DecodeError

from agent.rpc import codec
from agent.rpc.pages import PAGES
from agent.rpc.schema import HEALTH, INFERENCE
from agent.rpc.status import abort, text_of
from agent.rpc.stream import Stream
from skerry.errors import Denied, InternalError, NotFound, SkerryError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from agent.rpc.link import Link
    from agent.rpc.pages import Page

    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)

SERVICE = f"{INFERENCE.package}.GRPCInferenceService"
HEALTH_SERVICE = f"{HEALTH.package}.Health"
#: How often the daemon is asked how it is while somebody watches. It has no way to tell by itself.
WATCH_INTERVAL_S = 1.0
#: Metadata by which a stream's caller asks for a status instead of messages that carry errors.
_STATUS_WANTED = ("triton_grpc_error", "true")

_CHECKED = HEALTH["HealthCheckResponse"]


class Service:
    """All calls of both services.

    Args:
        link: to the daemon.
        uids: peer, as gRPC names it, -> uid of the client.
    """

    def __init__(self, link: Link, uids: Mapping[str, int]) -> None:
        self._link = link
        self._uids = uids
        self._codec = codec.Codec()
        self._stopping = asyncio.Event()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """What a server needs to serve them."""
        methods = {
            "ServerLive": _unary(self._guarded(self._server_live), INFERENCE["ServerLiveRequest"]),
            "ServerReady": _unary(self._guarded(self._server_ready), INFERENCE["ServerReadyRequest"]),
            "ModelReady": _unary(self._guarded(self._model_ready), INFERENCE["ModelReadyRequest"]),
            # These two read and write their messages themselves.
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._guarded(self._infer)),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream_infer),
        }
        for name, page in PAGES.items():
            methods[name] = _unary(self._guarded(self._paged(page)), page.request)
        health = {
            "Check": _unary(self._guarded(self._check), HEALTH["HealthCheckRequest"]),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self._watch, HEALTH["HealthCheckRequest"].FromString, _CHECKED.SerializeToString
            ),
        }
        return (
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler(HEALTH_SERVICE, health),
        )

    def stop(self) -> None:
        """Read no more requests from streams, and let nobody watch any longer; what is under way goes on."""
        self._stopping.set()
        for stream in self._streams:
            stream.stop()

    def _guarded(
        self, call: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """The call, its errors as status codes."""

        async def guarded(request: Any, context: Context) -> Any:  # noqa: ANN401 - any message
            try:
                return await call(request, context)
            except SkerryError as error:
                await abort(context, error)
            except Exception as error:  # a bug of ours must cost an answer, not the process
                log.exception("gRPC call failed")
                await abort(context, InternalError(f"gRPC call: {type(error).__name__}"))

        return guarded

    def _uid(self, context: Context) -> int:
        uid = self._uids.get(context.peer())
        if uid is None:
            raise Denied("gRPC: expected a client that came through the gateway's socket, got another")
        return uid

    # -- inference

    async def _infer(self, message: bytes, context: Context) -> bytes:
        call = self._codec.call(message, context.time_remaining())
        return b"".join(await self._run(call, self._uid(context)))

    async def _run(self, call: codec.Call, uid: int) -> list[bytes | memoryview]:
        reply = await self._link.ask(uid, "POST", call.path, call.json, call.tensors)
        try:
            return self._codec.answer(reply.json, reply.tensors)
        except DecodeError as error:
            raise InternalError(f"daemon: expected an answer of the protocol's form, got {error}") from error

    async def _stream_infer(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        wants_status = _STATUS_WANTED in [(key, value) for key, value in context.invocation_metadata() or ()]
        try:
            uid = self._uid(context)
        except SkerryError as denied:
            await abort(context, denied)
            return
        error: SkerryError | None = None
        stream = Stream(
            lambda message: self._in_stream(message, context.time_remaining(), uid, wants_status=wants_status)
        )
        self._streams.add(stream)
        async with contextlib.aclosing(stream.answers(messages)) as answers:
            async for answer in answers:
                if isinstance(answer, SkerryError):
                    error = answer
                    break
                yield answer
        if error is None and self._stopping.is_set():
            error = Unavailable("gRPC stream: the daemon stops")
        if error is not None:
            await abort(context, error)

    async def _in_stream(
        self, message: bytes, limit_s: float | None, uid: int, *, wants_status: bool
    ) -> bytes | SkerryError:
        """The answer to one request of a stream, or the error that is to end the stream."""
        request_id = ""
        try:
            call = self._codec.call(message, limit_s)
            request_id = call.id
            return codec.in_stream(await self._run(call, uid))
        except SkerryError as error:
            return error if wants_status else codec.stream_error(text_of(error), request_id)
        except Exception as error:  # as in _guarded
            log.exception("request in a gRPC stream failed")
            return InternalError(f"gRPC stream: {type(error).__name__}")

    # -- health

    async def _server_live(self, _: object, context: Context) -> bytes:
        live = await self._ok(context, "/v2/health/live")
        return bytes(INFERENCE["ServerLiveResponse"](live=live).SerializeToString())

    async def _server_ready(self, _: object, context: Context) -> bytes:
        ready = await self._ok(context, "/v2/health/ready")
        return bytes(INFERENCE["ServerReadyResponse"](ready=ready).SerializeToString())

    async def _model_ready(self, request: Any, context: Context) -> bytes:  # noqa: ANN401 - see Schema
        ready = await self._ok(context, f"/v2/{codec.model_path(request.name, request.version)}/ready")
        return bytes(INFERENCE["ModelReadyResponse"](ready=ready).SerializeToString())

    async def _ok(self, context: Context, path: str) -> bool:
        return (await self._link.ask(self._uid(context), "GET", path, may_fail=True)).ok

    async def _check(self, request: Any, context: Context) -> bytes:  # noqa: ANN401 - see Schema
        if request.service not in {"", SERVICE}:
            raise NotFound(f"health of {request.service!r}: expected '' or {SERVICE!r}")
        return bytes(_CHECKED(status=await self._serving(context)).SerializeToString())

    async def _serving(self, context: Context) -> int:
        ready = await self._ok(context, "/v2/health/ready")
        return int(_CHECKED.SERVING if ready else _CHECKED.NOT_SERVING)

    async def _watch(self, request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: ANN401 - see Schema
        known = request.service in {"", SERVICE}
        last = None
        while not self._stopping.is_set():
            try:
                status = await self._serving(context) if known else int(_CHECKED.SERVICE_UNKNOWN)
            except SkerryError as error:
                await abort(context, error)
                return
            if status != last:
                yield _CHECKED(status=status)
                last = status
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), WATCH_INTERVAL_S)
        yield _CHECKED(status=_CHECKED.NOT_SERVING)

    # -- pages

    def _paged(self, page: Page) -> Callable[[Any, Context], Awaitable[bytes]]:
        async def call(request: Any, context: Context) -> bytes:  # noqa: ANN401 - see Schema
            question = page.ask(request)
            if question is None:
                return bytes(page.response().SerializeToString())
            method, path, json, changes = question
            reply = await self._link.ask(self._uid(context), method, path, json, changes=changes)
            return bytes(page.read(reply.json).SerializeToString())

        return call


def _unary(
    call: Callable[[Any, Context], Awaitable[Any]],
    request: Any,  # noqa: ANN401 - see Schema
) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(call, request.FromString)
