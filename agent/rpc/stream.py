"""One stream of requests: several under way at once, answered in their order.

Leaves out: what an answer is, and what an error does to the stream (agent.rpc.service).

Rules
 * At most WINDOW requests are under way: beyond that the stream is not read, and the client's writes wait.
 * Whoever stops iterating ends what is under way.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from agent import tasks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine

    from skerry.errors import SkerryError

    Answer = bytes | SkerryError

#: Enough to fill a batch while another runs.
WINDOW = 32


class Stream:
    """One stream; iterate over `answers` once.

    Args:
        answer: what becomes of one request.
    """

    def __init__(self, answer: Callable[[bytes], Coroutine[None, None, Answer]]) -> None:
        self._answer = answer
        # One more is being awaited, and one waits to be put in.
        self._under_way: asyncio.Queue[asyncio.Task[Answer] | None] = asyncio.Queue(WINDOW - 2)
        self._started: set[asyncio.Task[Answer]] = set()
        self._reader: asyncio.Task[None] | None = None
        self._stopped = False

    async def answers(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[Answer, None]:
        """The answers to `messages`, in their order; ends when those do, or after `stop`."""
        reader = self._reader = tasks.spawn(self._read(messages), "reader of a gRPC stream")
        try:
            while (task := await self._under_way.get()) is not None:
                yield await task
        finally:
            self._stopped = False  # what is cancelled now is to end, not to finish
            reader.cancel()
            for other in list(self._started):
                other.cancel()
            # Nobody may be reading from a call when it is aborted.
            await asyncio.wait([reader])

    def stop(self) -> None:
        """Read no more requests; those under way are still answered."""
        self._stopped = True
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        try:
            async for message in messages:
                task = tasks.spawn(self._answer(message), "request of a gRPC stream")
                self._started.add(task)
                task.add_done_callback(self._started.discard)
                await self._under_way.put(task)
        except asyncio.CancelledError:
            if not self._stopped:
                raise
        await self._under_way.put(None)
