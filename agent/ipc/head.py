"""The head of an HTTP request -> which page, how long a body, what to do with the connection.

Does: parse with httptools (llhttp, node's parser), check what a head may say, choose the answer's encoding.
Leaves out: which page a path is (agent.ipc.routes), bodies and sockets (agent.ipc.http).

Clients on keep-alive connections send the same head again and again, so parsed heads are remembered by
their bytes; a head that was seen costs one dictionary look-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import httptools

from agent.ipc import routes
from agent.ipc.encodings import Encoding, accepted, named
from agent.ipc.routes import Page
from skerry.errors import InvalidRequest, SkerryError, TooLarge, Unsupported
from skerry.terms import KIB, MIB

#: Heads remembered, and the longest one worth remembering: at most 1 MiB in all, and in practice some KiB.
MAX_HEADS = 1024
MAX_REMEMBERED_BYTES = KIB
#: Body of any page but an inference: settings and names, which a person could have typed.
MAX_PAGE_BODY_BYTES = MIB


class RequestTimeout(InvalidRequest):
    """The request did not come whole in its time."""


class Head(NamedTuple):
    """A parsed head. `error` is what the request will be answered with once its body is out of the way.

    `json_bytes` is Inference-Header-Content-Length, or -1 if there is none; of an encoded body it counts what
    comes out. `body_bytes` is -1 for a chunked body, whose length only its end tells.
    """

    page: Page | None
    model: str = ""
    version: int | None = None
    region: str | None = None
    body_bytes: int = 0
    json_bytes: int = -1
    keep_alive: bool = True
    expects_continue: bool = False
    head_only: bool = False
    error: SkerryError | None = None
    #: Whose request it is, if whoever sends it speaks for somebody else.
    acting_uid: int | None = None
    #: Whether the bytes behind this head can still be told apart; if not, the connection ends.
    framed: bool = True
    #: Of the request's body, and the one that the client would like the answer's to have.
    encoding: Encoding | None = None
    wanted: Encoding | None = None
    #: An inference with a body as it is. All others, `error` included, take the longer way.
    ordinary: bool = False

    def refused(self, error: SkerryError) -> Head:
        """The same head, to be answered with this error."""
        return self._replace(error=error, ordinary=False)


class HeadParser:
    """Heads -> Head, with a memory. One per listener."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def parse(self, raw: bytes, max_body_bytes: int) -> Head:
        """Parse one head, up to and including the empty line. Never raises: see Head.error."""
        head = self._known.get(raw)
        if head is None:
            head = _parse(raw)
            if len(raw) <= MAX_REMEMBERED_BYTES and head.error is None:
                if len(self._known) >= MAX_HEADS:
                    self._known.clear()
                self._known[raw] = head
        if head.body_bytes > max_body_bytes:
            error = TooLarge(
                f"request body: expected at most {max_body_bytes} bytes, got {head.body_bytes}",
                "raise ipc.max_body, or send less at once",
            )
            return head.refused(error)._replace(framed=False)
        return head


class _Fields:
    """What httptools calls back with."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.parser = httptools.HttpRequestParser(self)
        self.keep_alive = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        # Asked later, the parser of a request without a body has forgotten it. Clients of HTTP/1.0 would have
        # to be told that they may stay; they are not worth it.
        self.keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() == "1.1"


def _parse(raw: bytes) -> Head:
    fields = _Fields()
    parser = fields.parser
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        return Head(
            None,
            error=Unsupported("protocol upgrade: expected HTTP/1.1, got a request to leave it"),
            framed=False,
        )
    except httptools.HttpParserError as error:
        return Head(
            None, error=InvalidRequest(f"request head: expected HTTP/1.1, got: {error}"), framed=False
        )
    headers = fields.headers
    method = parser.get_method().decode()
    chunked = b"chunked" in headers.get(b"transfer-encoding", b"").lower()
    body_bytes = -1 if chunked else int(headers.get(b"content-length", b"0"))
    frame: dict[str, Any] = {
        "body_bytes": body_bytes,
        # A chunked body ends where its parser says; what the parser has eaten beyond is not given back.
        "keep_alive": fields.keep_alive and not chunked,
        "expects_continue": headers.get(b"expect", b"").lower() == b"100-continue",
        "head_only": method == "HEAD",
    }
    try:
        encoding = named(headers.get(b"content-encoding", b""))
        json_bytes = _json_bytes(headers, body_bytes if encoding is None else -1)
        acting_uid = _acting_uid(headers)
        page, model, version, region = routes.find(method, fields.url)
        if page is not Page.INFER:
            _check_page_body(body_bytes)
    except SkerryError as error:
        return Head(None, error=error, **frame)
    return Head(
        page,
        model,
        version,
        region,
        json_bytes=json_bytes,
        acting_uid=acting_uid,
        encoding=encoding,
        wanted=accepted(headers.get(b"accept-encoding", b"")),
        ordinary=page is Page.INFER and encoding is None,
        **frame,
    )


def _check_page_body(body_bytes: int) -> None:
    if body_bytes > MAX_PAGE_BODY_BYTES:
        raise TooLarge(
            f"request body: expected at most {MAX_PAGE_BODY_BYTES} bytes for this page, got {body_bytes}"
        )


def _json_bytes(headers: dict[bytes, bytes], body_bytes: int) -> int:
    value = headers.get(b"inference-header-content-length")
    if value is None:
        return -1
    if not value.isdigit() or len(value) > 18 or (body_bytes >= 0 and int(value) > body_bytes):
        most = f", at most the body's {body_bytes} bytes" if body_bytes >= 0 else ""
        raise InvalidRequest(
            f"header Inference-Header-Content-Length: expected the length of the JSON{most},"
            f" got {value.decode('latin-1')!r}",
        )
    return int(value)


def _acting_uid(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"skerry-acting-uid")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 10:
        raise InvalidRequest(f"header Skerry-Acting-Uid: expected a uid, got {value.decode('latin-1')!r}")
    return int(value)
