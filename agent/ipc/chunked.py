"""A request body of unknown length, as it comes in chunks.

httptools takes the chunks apart. What it is fed beyond the end of the body is lost, so the connection ends with
such a request (agent.ipc.head).
"""

from __future__ import annotations

import httptools

from skerry.errors import InvalidRequest, TooLarge


class ChunkedBody:
    """A body with Transfer-Encoding: chunked, taken apart by httptools."""

    def __init__(self, limit_bytes: int) -> None:
        self.body = bytearray()
        self.complete = False
        self._limit_bytes = limit_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        """Httptools has found this much of the body."""
        self.body += data

    def on_message_complete(self) -> None:
        """Httptools has found its end."""
        self.complete = True

    def feed(self, data: bytes) -> int:
        """Take what belongs to the body; returns how many bytes that was."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise InvalidRequest(f"chunked body: expected chunks, got: {error}") from None
        if len(self.body) > self._limit_bytes:
            raise TooLarge(
                f"request body: expected at most {self._limit_bytes} bytes, got more",
                "send less at once; ipc.max_body is the ceiling of inferences",
            )
        return len(data)
