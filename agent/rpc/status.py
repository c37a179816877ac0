"""Which error gets which of gRPC's status codes. The one place where they stand.

`Overloaded` is UNAVAILABLE and not RESOURCE_EXHAUSTED: nothing ran, and UNAVAILABLE is what clients' retry policies
send again. When is said in the trailing metadata, to gRPC's own retries and to people.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpc import StatusCode

from skerry.errors import (
    DeadlineExceeded,
    Denied,
    InvalidRequest,
    NotFound,
    Overloaded,
    SkerryError,
    TooLarge,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

#: A status travels in HTTP/2 headers, of which clients take 8 KiB by default; as percent-encoding a character may
#: take twelve bytes.
MAX_TEXT_CHARS = 600

_CODES: list[tuple[type[SkerryError], StatusCode]] = [
    (TooLarge, StatusCode.RESOURCE_EXHAUSTED),  # as gRPC itself answers a message over its ceiling
    (InvalidRequest, StatusCode.INVALID_ARGUMENT),
    (NotFound, StatusCode.NOT_FOUND),
    (Denied, StatusCode.PERMISSION_DENIED),
    (DeadlineExceeded, StatusCode.DEADLINE_EXCEEDED),
    (Unavailable, StatusCode.UNAVAILABLE),
    (Unsupported, StatusCode.UNIMPLEMENTED),
]


def code_of(error: SkerryError) -> StatusCode:
    """The status code; INTERNAL for what is nobody's fault but ours or the model's."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), StatusCode.INTERNAL)


def text_of(error: SkerryError) -> str:
    """Message and hint, as long as a status may be."""
    text = str(error)
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "…"


async def abort(context: ServicerContext, error: SkerryError) -> None:  # type: ignore[type-arg] # any messages
    """End the call with this error; never returns."""
    retry: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded):
        retry = (
            ("grpc-retry-pushback-ms", str(1000 * error.retry_after_s)),
            ("retry-after", str(error.retry_after_s)),
        )
    await context.abort(code_of(error), text_of(error), retry)
