"""The table of pages: which path and verb asks for what, and which of it is administration.

Does: match a path, check the names in it, say which verbs a page has.
Leaves out: the rest of a head (agent.ipc.head), what pages answer (agent.ipc.pages).
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import httptools

from skerry.errors import InvalidRequest, NotFound, Unsupported
from skerry.terms import check_model_name, parse_version


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
    STATISTICS = enum.auto()
    INDEX = enum.auto()
    LOAD = enum.auto()
    UNLOAD = enum.auto()
    LOGGING = enum.auto()
    SET_LOGGING = enum.auto()
    TRACE = enum.auto()
    SET_TRACE = enum.auto()
    METRICS = enum.auto()
    STATUS = enum.auto()
    TABLE = enum.auto()
    PLACEMENT = enum.auto()
    PROVIDERS = enum.auto()
    REFRESH = enum.auto()
    SCRUB = enum.auto()
    CLEAR = enum.auto()
    DENIALS = enum.auto()
    SHARED = enum.auto()
    SHARE = enum.auto()
    UNSHARE = enum.auto()
    CUDA_SHARED = enum.auto()
    CUDA_SHARE = enum.auto()
    CUDA_UNSHARE = enum.auto()


#: Whoever may connect may see whether we live.
OPEN_PAGES = frozenset({Page.LIVE, Page.READY, Page.SERVER})
#: Lists are open to whoever may connect, too: they show what that one may read.
LISTS = frozenset({Page.MODELS, Page.METRICS, Page.TABLE, Page.STATISTICS, Page.INDEX})
#: A user's own shared memory, for whoever may run a model at all.
SHARING = frozenset(
    {Page.SHARED, Page.SHARE, Page.UNSHARE, Page.CUDA_SHARED, Page.CUDA_SHARE, Page.CUDA_UNSHARE}
)
#: What changes something, and who was refused. All others only read, or run a model.
ADMINISTRATION = frozenset(
    {
        Page.LOAD,
        Page.UNLOAD,
        Page.SET_LOGGING,
        Page.SET_TRACE,
        Page.REFRESH,
        Page.SCRUB,
        Page.CLEAR,
        Page.DENIALS,
    }
)

_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_REPOSITORY = r"/v2/repository(?:/(?P<repository>[^/]+))?"
_OWN_MODEL = r"/skerry/v1/models/(?P<model>[^/]+)"
#: The first pattern that fits decides: a model named "stats" has its metadata at /versions/N.
_ROUTES: list[tuple[re.Pattern[str], dict[str, Page]]] = [
    (re.compile(pattern), methods)
    for pattern, methods in (
        (_MODEL + "/infer", {"POST": Page.INFER}),
        ("/v2/models/stats", {"GET": Page.STATISTICS}),
        (_MODEL, {"GET": Page.MODEL}),
        (_MODEL + "/ready", {"GET": Page.MODEL_READY}),
        (_MODEL + "/config", {"GET": Page.MODEL_CONFIG}),
        (_MODEL + "/stats", {"GET": Page.STATISTICS}),
        (_MODEL + "/trace/setting", {"GET": Page.TRACE, "POST": Page.SET_TRACE}),
        ("/v2/?", {"GET": Page.SERVER}),
        ("/v2/health/live", {"GET": Page.LIVE}),
        ("/v2/health/ready", {"GET": Page.READY}),
        ("/v2/models", {"GET": Page.MODELS}),
        (_REPOSITORY + "/index", {"POST": Page.INDEX}),
        (_REPOSITORY + "/models/(?P<model>[^/]+)/load", {"POST": Page.LOAD}),
        (_REPOSITORY + "/models/(?P<model>[^/]+)/unload", {"POST": Page.UNLOAD}),
        ("/v2/systemsharedmemory(?:/region/(?P<region>[^/]+))?/status", {"GET": Page.SHARED}),
        ("/v2/systemsharedmemory/region/(?P<region>[^/]+)/register", {"POST": Page.SHARE}),
        ("/v2/systemsharedmemory(?:/region/(?P<region>[^/]+))?/unregister", {"POST": Page.UNSHARE}),
        ("/v2/cudasharedmemory(?:/region/(?P<region>[^/]+))?/status", {"GET": Page.CUDA_SHARED}),
        ("/v2/cudasharedmemory/region/(?P<region>[^/]+)/register", {"POST": Page.CUDA_SHARE}),
        ("/v2/cudasharedmemory(?:/region/(?P<region>[^/]+))?/unregister", {"POST": Page.CUDA_UNSHARE}),
        ("/v2/logging", {"GET": Page.LOGGING, "POST": Page.SET_LOGGING}),
        ("/v2/trace/setting", {"GET": Page.TRACE, "POST": Page.SET_TRACE}),
        ("/metrics", {"GET": Page.METRICS}),
        ("/skerry/v1/status", {"GET": Page.STATUS}),
        ("/skerry/v1/models", {"GET": Page.TABLE}),
        (_OWN_MODEL + "/placement", {"GET": Page.PLACEMENT}),
        (_OWN_MODEL + "/clear", {"POST": Page.CLEAR}),
        ("/skerry/v1/providers", {"GET": Page.PROVIDERS}),
        ("/skerry/v1/registry/refresh", {"POST": Page.REFRESH}),
        ("/skerry/v1/registry/scrub", {"POST": Page.SCRUB}),
        ("/skerry/v1/denials", {"GET": Page.DENIALS}),
    )
]


class MethodNotAllowed(InvalidRequest):
    """The page exists, for another verb; `allowed` has those that it answers."""

    def __init__(self, message: str, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class Route(NamedTuple):
    """A page, and the model that its path names; the empty name where it names none. Likewise a region of memory."""

    page: Page
    model: str = ""
    version: int | None = None
    region: str | None = None


def find(method: str, url: bytes) -> Route:
    """What a request line asks for. HEAD is GET here.

    Raises:
        NotFound: no page has this path.
        MethodNotAllowed: it has one, for another verb.
        InvalidRequest: the target is none, or a model's name or version cannot be one.
        Unsupported: it names a model repository; a node has one, and that has no name.
    """
    try:
        parsed = httptools.parse_url(url)
        path = unquote((parsed.path or b"/").decode("ascii"), errors="strict")
        query = parse_qs((parsed.query or b"").decode("ascii"))
    except (httptools.HttpParserError, UnicodeDecodeError, ValueError):
        raise InvalidRequest(f"request target: expected a path, got {url[:200]!r}") from None
    found, methods = _match(method, path)
    page = methods.get("GET" if method == "HEAD" else method)
    if page is None:
        raise MethodNotAllowed(
            f"{method} {path}: expected {' or '.join(methods)}, got {method}", _with_head(methods)
        )
    if found.get("repository") is not None:
        raise Unsupported(
            f"model repository {found['repository']!r}: expected none named, got a name",
            "this node has one registry; leave the name out of the path",
        )
    version = found.get("version") or query.get("version", [None])[0]
    model = found.get("model")
    return Route(
        page,
        check_model_name(model) if model is not None else "",
        parse_version(version) if version is not None else None,
        found.get("region"),
    )


def _match(method: str, path: str) -> tuple[dict[str, str], dict[str, Page]]:
    """The names in the path, and the pages that it has by verb."""
    for pattern, methods in _ROUTES:
        match = pattern.fullmatch(path)
        if match is not None:
            return match.groupdict(), methods
    raise NotFound(f"{method} {path[:200]}: no such page")


def _with_head(methods: dict[str, Page]) -> tuple[str, ...]:
    return (*methods, "HEAD") if "GET" in methods else tuple(methods)
