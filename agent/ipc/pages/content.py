"""What pages have in common: their form, their handlers' form, JSON in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

import msgspec

from agent.ipc import replies
from agent.ipc.head import Head
from agent.ipc.peer import Peer
from agent.version import Version
from skerry.errors import InvalidRequest

Content = tuple[bytes, bytes, bytes]  # status, content type, body
Handler = Callable[[Head, bytes, Peer], Content | Awaitable[Content]]
#: The versions that somebody may read of.
Readable = Callable[[Peer], list[Version]]

_T = TypeVar("_T")
_encode = msgspec.json.Encoder().encode


class Node(Protocol):
    """What pages need of the daemon."""

    def status(self) -> dict[str, Any]:
        """The status page's document."""

    def is_ready(self) -> bool:
        """Whether every model that was there at the start has been tried, or had its time."""

    async def refresh(self) -> None:
        """Read the registry again and follow it."""

    async def scrub(self, digests: Collection[str]) -> dict[str, Any]:
        """Have installed files read again; none named: all of them."""

    def registry(self) -> dict[str, Any]:
        """What the status page says of the registry."""

    async def providers(self) -> dict[str, Any]:
        """The providers page's document."""

    def rss_bytes(self, pid: int | None) -> int:
        """Resident memory of a process; 0 if there is none."""


def json(document: Any, status: bytes = replies.OK) -> Content:  # noqa: ANN401 - whatever a page is made of
    """A page of JSON."""
    return status, replies.JSON, _encode(document)


def parse(body: bytes, form: type[_T], what: str) -> _T:
    """The JSON of a page's body; an empty body is an empty object, as clients send it.

    Args:
        body: as it came.
        form: a struct; what it does not forbid is ignored.
        what: names the request in the error.

    Raises:
        InvalidRequest: not JSON, or not of this form; the message has the path to the fault.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=form)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{what}: {error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{what}: expected JSON, got something else: {error}") from None
