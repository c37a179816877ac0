"""The longer way through a connection: pages, and bodies that come or leave compressed.

Does: everything that an ordinary inference (agent.ipc.http) has no need of, so that it need not ask for it.
Leaves out: sockets and framing (agent.ipc.http), what pages say (agent.ipc.pages), zlib (agent.ipc.encodings).

Rules
 * The loop is never held up: what zlib needs long for happens in a thread, where it lets go of the lock.
 * Whoever asked may be gone when that is over; what was borrowed is given back all the same.
 * A bug in a page costs an answer, not the connection.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from agent import tasks
from agent.ipc import encodings, replies
from agent.ipc.head import MAX_PAGE_BODY_BYTES
from agent.ipc.routes import Page
from skerry.errors import InternalError, InvalidRequest, SkerryError, TooLarge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.ipc.encodings import Encoding
    from agent.ipc.head import Head
    from agent.ipc.pages import Content, Pages
    from agent.ipc.peer import Peer

log = logging.getLogger(__name__)


class Asker(Protocol):
    """The connection, as far as it matters here."""

    peer: Peer

    def is_gone(self) -> bool:
        """Whether nobody is there any more."""

    def is_closing(self) -> bool:
        """Whether the answer is the connection's last."""

    def infer(self, head: Head, body: memoryview) -> None:
        """Run an inference whose body is complete and not encoded."""

    def refuse(self, error: SkerryError) -> None:
        """Answer with an error."""

    def reply(self, answer: bytes) -> None:
        """Answer with these bytes, head included."""


def most_body_bytes(head: Head, limit_bytes: int) -> int:
    """The ceiling of a body, on the wire and inflated; `limit_bytes` is that of inferences."""
    return limit_bytes if head.page in {None, Page.INFER} else min(limit_bytes, MAX_PAGE_BODY_BYTES)


def take(asker: Asker, head: Head, body: bytes | memoryview, pages: Pages, limit_bytes: int) -> None:
    """Answer a request that is not `ordinary` and whose body is complete; it may take until later.

    Args:
        asker: who asked.
        head: what was asked.
        body: as it came; must stay as it is until the answer.
        pages: what is answered.
        limit_bytes: ceiling of an inference's body, inflated.
    """
    if head.error is not None:
        asker.refuse(head.error)
    elif head.encoding is not None:
        _inflate(asker, head, head.encoding, body, pages, most_body_bytes(head, limit_bytes))
    else:
        _show(asker, head, body, pages)


# -- bodies that come compressed


def _inflate(  # noqa: PLR0913, PLR0917 - what a request consists of
    asker: Asker, head: Head, encoding: Encoding, body: bytes | memoryview, pages: Pages, most: int
) -> None:
    if len(body) <= encodings.AT_ONCE_BYTES:
        try:
            plain = encodings.inflate(body, encoding, min(most, encodings.AT_ONCE_BYTES))
        except TooLarge:
            pass  # it is larger than it looked: once more, and elsewhere
        except SkerryError as error:
            asker.refuse(error)
            return
        else:
            _go_on(asker, head, plain, pages)
            return
    tasks.spawn(_inflate_apart(asker, head, encoding, body, pages, most), "inflate a body")


async def _inflate_apart(  # noqa: PLR0913, PLR0917 - likewise
    asker: Asker, head: Head, encoding: Encoding, body: bytes | memoryview, pages: Pages, most: int
) -> None:
    try:
        plain = await asyncio.to_thread(encodings.inflate, body, encoding, most)
    except SkerryError as error:
        asker.refuse(error)
        return
    if not asker.is_gone():
        _go_on(asker, head, plain, pages)


def _go_on(asker: Asker, head: Head, plain: bytes, pages: Pages) -> None:
    if head.page is not Page.INFER:
        _show(asker, head, plain, pages)
    elif head.json_bytes > len(plain):
        asker.refuse(
            InvalidRequest(
                "header Inference-Header-Content-Length: expected at most the inflated body's"
                f" {len(plain)} bytes, got {head.json_bytes}"
            )
        )
    else:
        asker.infer(head, memoryview(plain))


# -- pages


def _show(asker: Asker, head: Head, body: bytes | memoryview, pages: Pages) -> None:
    try:
        page = pages.answer(head, bytes(body), asker.peer)
    except SkerryError as error:
        asker.refuse(error)
    except Exception as error:
        log.exception("page %s failed", head.page)
        asker.refuse(InternalError(f"page {head.page}: {type(error).__name__}"))
    else:
        if isinstance(page, tuple):
            _send(asker, head, page)
        else:
            tasks.spawn(_show_later(asker, head, page), f"page {head.page}")


async def _show_later(asker: Asker, head: Head, page: Awaitable[Content]) -> None:
    try:
        content = await page
    except SkerryError as error:
        asker.refuse(error)
    except Exception as error:
        asker.refuse(InternalError(f"page {head.page}: {type(error).__name__}"))
        raise
    else:
        _send(asker, head, content)


def _send(asker: Asker, head: Head, page: Content) -> None:
    status, kind, content = page
    if head.wanted is not None and len(content) >= encodings.MIN_COMPRESSED_BYTES:
        compress(asker, head, head.wanted, kind, [content], status=status)
    else:
        asker.reply(replies.page(status, kind, content, close=asker.is_closing(), head_only=head.head_only))


# -- bodies that leave compressed


def compress(  # noqa: PLR0913 - the fields of an answer
    asker: Asker,
    head: Head,
    encoding: Encoding,
    kind: bytes,
    parts: list[bytes | memoryview],
    *,
    status: bytes = replies.OK,
    json_bytes: int = -1,
    release: Callable[[], None] = lambda: None,
) -> None:
    """Answer with the parts as one compressed body.

    Args:
        asker: who gets it.
        head: what was asked.
        encoding: how to compress.
        kind: content type.
        parts: borrowed until `release` is called.
        status: code and phrase.
        json_bytes: of these the JSON in front of binary tensors; -1 if there are none.
        release: called when the parts have been read.
    """

    def finish(content: bytes) -> None:
        asker.reply(
            replies.compressed(
                status,
                kind,
                content,
                encoding,
                json_bytes=json_bytes,
                close=asker.is_closing(),
                head_only=head.head_only,
            )
        )

    if sum(map(len, parts)) > encodings.AT_ONCE_BYTES:
        tasks.spawn(_compress_apart(parts, encoding, release, finish), "compress an answer")
        return
    content = encodings.compress(parts, encoding)
    release()
    finish(content)


async def _compress_apart(
    parts: list[bytes | memoryview],
    encoding: Encoding,
    release: Callable[[], None],
    finish: Callable[[bytes], None],
) -> None:
    try:
        content = await asyncio.to_thread(encodings.compress, parts, encoding)
    finally:
        release()
    finish(content)
