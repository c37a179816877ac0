"""The head of an HTTP request -> which page, how long a body, what to do with the connection.

Does: parse with httptools (llhttp, node's parser), route, check what a head may say.
Leaves out: bodies and sockets (agent.ipc.http), what pages answer (agent.ipc.pages).

Clients on keep-alive connections send the same head again and again, so parsed heads are remembered by
their bytes; a head that was seen costs one dictionary look-up.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import httptools

from skerry.errors import InvalidRequest, NotFound, SkerryError, TooLarge, Unsupported
from skerry.terms import KIB, check_model_name, parse_version

#: Heads remembered, and the longest one worth remembering: at most 1 MiB in all, and in practice some KiB.
MAX_HEADS = 1024
MAX_REMEMBERED_BYTES = KIB


class Page(enum.Enum):
    """What can be asked for."""

    LIVE = enum.auto()
    READY = enum.auto()
    SERVER = enum.auto()
    MODELS = enum.auto()
    MODEL = enum.auto()
    MODEL_READY = enum.auto()
    MODEL_CONFIG = enum.auto()
    INFER = enum.auto()
    METRICS = enum.auto()
    STATUS = enum.auto()
    TABLE = enum.auto()
    PLACEMENT = enum.auto()
    PROVIDERS = enum.auto()
    REFRESH = enum.auto()
    CLEAR = enum.auto()


_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_ROUTES: list[tuple[re.Pattern[str], dict[str, Page]]] = [
    (re.compile(pattern), methods)
    for pattern, methods in (
        (_MODEL + "/infer", {"POST": Page.INFER}),
        (_MODEL, {"GET": Page.MODEL}),
        (_MODEL + "/ready", {"GET": Page.MODEL_READY}),
        (_MODEL + "/config", {"GET": Page.MODEL_CONFIG}),
        ("/v2/?", {"GET": Page.SERVER}),
        ("/v2/health/live", {"GET": Page.LIVE}),
        ("/v2/health/ready", {"GET": Page.READY}),
        ("/v2/models", {"GET": Page.MODELS}),
        ("/metrics", {"GET": Page.METRICS}),
        ("/skerry/v1/status", {"GET": Page.STATUS}),
        ("/skerry/v1/models", {"GET": Page.TABLE}),
        ("/skerry/v1/models/(?P<model>[^/]+)/placement", {"GET": Page.PLACEMENT}),
        ("/skerry/v1/models/(?P<model>[^/]+)/clear", {"POST": Page.CLEAR}),
        ("/skerry/v1/providers", {"GET": Page.PROVIDERS}),
        ("/skerry/v1/registry/refresh", {"POST": Page.REFRESH}),
    )
]


class MethodNotAllowed(InvalidRequest):
    """The page exists, for another verb."""


class Head(NamedTuple):
    """A parsed head. `error` is what the request will be answered with once its body is out of the way.

    `json_bytes` is Inference-Header-Content-Length, or -1 if there is none. `body_bytes` is -1 for a chunked
    body, whose length only its end tells.
    """

    page: Page | None
    model: str = ""
    version: int | None = None
    body_bytes: int = 0
    json_bytes: int = -1
    keep_alive: bool = True
    expects_continue: bool = False
    head_only: bool = False
    error: SkerryError | None = None
    #: Whether the bytes behind this head can still be told apart; if not, the connection ends.
    framed: bool = True


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
            return head._replace(error=error, framed=False)
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
    frame = {
        "body_bytes": body_bytes,
        # A chunked body ends where its parser says; what the parser has eaten beyond is not given back.
        "keep_alive": fields.keep_alive and not chunked,
        "expects_continue": headers.get(b"expect", b"").lower() == b"100-continue",
        "head_only": method == "HEAD",
    }
    try:
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Unsupported(
                f"request body: expected no Content-Encoding, got {headers[b'content-encoding'].decode('latin-1')}",
            )
        json_bytes = _json_bytes(headers, body_bytes)
        page, model, version = _route(method, fields.url)
    except SkerryError as error:
        return Head(None, error=error, **frame)  # type: ignore[arg-type] # each value has its field's type
    return Head(page, model, version, json_bytes=json_bytes, **frame)  # type: ignore[arg-type] # likewise


def _json_bytes(headers: dict[bytes, bytes], body_bytes: int) -> int:
    value = headers.get(b"inference-header-content-length")
    if value is None:
        return -1
    if not value.isdigit() or len(value) > 18 or (body_bytes >= 0 and int(value) > body_bytes):
        raise InvalidRequest(
            "header Inference-Header-Content-Length: expected the length of the JSON, at most the body's"
            f" {body_bytes} bytes, got {value.decode('latin-1')!r}",
        )
    return int(value)


def _route(method: str, url: bytes) -> tuple[Page, str, int | None]:
    try:
        parsed = httptools.parse_url(url)
        path = unquote((parsed.path or b"/").decode("ascii"), errors="strict")
        query = parse_qs((parsed.query or b"").decode("ascii"))
    except (httptools.HttpParserError, UnicodeDecodeError, ValueError):
        raise InvalidRequest(f"request target: expected a path, got {url[:200]!r}") from None
    for pattern, methods in _ROUTES:
        match = pattern.fullmatch(path)
        if match is None:
            continue
        page = methods.get("GET" if method == "HEAD" else method)
        if page is None:
            raise MethodNotAllowed(f"{method} {path}: expected {' or '.join(methods)}, got {method}")
        found = match.groupdict()
        version = found.get("version") or query.get("version", [None])[0]
        model = found.get("model")
        return (
            page,
            check_model_name(model) if model is not None else "",
            parse_version(version) if version is not None else None,
        )
    raise NotFound(f"{method} {path[:200]}: no such page")
