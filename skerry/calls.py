"""What can be asked of a daemon, as calls that either client carries out.

Does: the request of each call as bytes, and what its answer is.
Leaves out: carrying it out (skerry.client, skerry.asyncclient).

Rules
 * A call holds its own half-read answer; each attempt to carry it out begins anew.
 * `repeatable` is true only where sending it twice is the same as sending it once.

Source: https://github.com/kserve/open-inference-protocol, inference_rest.md; Triton's extension_model_repository.md,
extension_statistics.md and extension_shared_memory.md.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypedDict, TypeVar
from urllib.parse import quote

from skerry import h1
from skerry.errors import DeadlineExceeded, InternalError
from skerry.plans import model_path
from skerry.results import Reading, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from skerry.arrays import Array
    from skerry.plans import Plan, Question, Scalar
    from skerry.results import Forms

GRACE_S = 2.0  # the daemon ends a run within workers.kill_grace of its deadline, and then answers

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Call(Protocol[T_co]):
    """One request and what its answer becomes."""

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice is the same as sending it once."""

    @property
    def grace_s(self) -> float:
        """How much longer than the call's time to wait for the server to say that it ran out."""

    def request(self, late_s: float) -> Sequence[bytes | memoryview]:
        """What to send; `late_s` of the call's time has been spent waiting."""

    def take_lead(self, lead: bytes | bytearray) -> Sequence[memoryview]:
        """See skerry.receiver."""

    def result(self) -> T_co:
        """What the complete answer means."""


class IndexEntry(NamedTuple):
    """One version of one model in the repository.

    `state` is UNKNOWN, READY, UNAVAILABLE, LOADING or UNLOADING; `reason` says why it is not READY.
    """

    name: str
    version: str
    state: str
    reason: str


class Duration(TypedDict):
    """How often something happened, and how long it took altogether."""

    count: int
    ns: int


class BatchStatistics(TypedDict):
    """Runs of one batch size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(TypedDict):
    """What one version did since it was loaded, as Triton's statistics extension has it.

    `last_inference` is in milliseconds since 1970, 0 if there was none. `inference_count` counts rows that ran,
    `execution_count` runs. `inference_stats` has success, fail, queue, compute_input, compute_infer,
    compute_output, cache_hit and cache_miss.
    """

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, Duration]
    batch_stats: list[BatchStatistics]


class Page(Generic[T]):
    """A GET or POST with JSON both ways.

    Args:
        method: GET or POST.
        path: quoted.
        host: the Host header.
        read: parsed JSON ({} for an empty body) -> result.
        body: None sends none.
        repeatable: as in Call.
    """

    __slots__ = ("_document", "_read", "_request", "repeatable")

    grace_s = 0.0

    def __init__(  # noqa: PLR0913 - the parts of one exchange; all but three by keyword
        self,
        method: str,
        path: str,
        host: str,
        *,
        read: Callable[[Any], T],
        body: Mapping[str, Any] | None = None,
        repeatable: bool | None = None,
    ) -> None:
        encoded = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else "application/json"
        length = b"" if method == "GET" else b"Content-Length: %d\r\n" % len(encoded)
        self._request = [b"%b%b\r\n%b" % (h1.request_front(method, path, host, kind), length, encoded)]
        self._read = read
        self._document: Any = None
        self.repeatable = method == "GET" if repeatable is None else repeatable

    def request(self, late_s: float) -> Sequence[bytes | memoryview]:  # noqa: ARG002 - Call's signature
        """What to send."""
        return self._request

    def take_lead(self, lead: bytes | bytearray) -> Sequence[memoryview]:
        """The whole body."""
        self._document = self._read(json.loads(lead) if lead else {})
        return ()

    def result(self) -> T:
        """What it said."""
        document: T = self._document
        return document


class Infer:
    """One inference.

    Args:
        plan: for questions with this one's key.
        asked: the question.
        forms: remembered answers.
        timeout_s: see `Client.infer`.
        request_id: likewise.
        locate: where outputs may lie in shared memory; None where none may.
    """

    __slots__ = ("_asked", "_forms", "_locate", "_plan", "_reading", "_request_id", "_timeout_s", "grace_s")

    repeatable = False

    def __init__(  # noqa: PLR0913, PLR0917 - what makes up a request
        self,
        plan: Plan,
        asked: Question,
        forms: Forms,
        timeout_s: float | None,
        request_id: str | None,
        locate: Callable[[str, int], Array | None] | None = None,
    ) -> None:
        self._plan = plan
        self._asked = asked
        self._forms = forms
        self._timeout_s = timeout_s
        self.grace_s = 0.0 if timeout_s is None else GRACE_S
        self._request_id = request_id
        self._locate = locate
        self._reading: Reading | None = None

    def request(self, late_s: float) -> Sequence[bytes | memoryview]:
        """What to send."""
        timeout_s = self._timeout_s
        if timeout_s is not None and late_s:
            timeout_s -= late_s
            if timeout_s <= 0:
                raise DeadlineExceeded("inference: its time was over before it could be sent")
        return self._plan.request(self._asked, timeout_s, self._request_id)

    def take_lead(self, lead: bytes | bytearray) -> Sequence[memoryview]:
        """The JSON: make room for the tensors."""
        self._reading = Reading(self._forms.read(lead), self._locate)
        return self._reading.sinks

    def result(self) -> Result:
        """The answer."""
        if self._reading is None:
            raise InternalError("response: expected an answer, got none")
        return self._reading.result()


class Pages:
    """Every call but inference, for one daemon.

    Args:
        host: the Host header.
    """

    def __init__(self, host: str) -> None:
        self._host = host

    def document(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Page[Any]:
        """Any page with JSON."""
        return Page(method, path, self._host, read=_read_any, body=body)

    def metadata(self, model: str, version: str | int | None) -> Page[dict[str, Any]]:
        """A model's inputs and outputs."""
        return Page("GET", model_path(model, version), self._host, read=_read_object)

    def ready(self, model: str | None = None, version: str | int | None = None) -> Page[bool]:
        """Whether the node, or one model, is ready."""
        path = "/v2/health/ready" if model is None else f"{model_path(model, version)}/ready"
        return Page("GET", path, self._host, read=_read_yes)

    def live(self) -> Page[bool]:
        """Whether the node lives."""
        return Page("GET", "/v2/health/live", self._host, read=_read_yes)

    def load(self, model: str, parameters: Mapping[str, Scalar] | None) -> Page[None]:
        """Load a model."""
        body = {"parameters": dict(parameters)} if parameters else {}
        return Page("POST", f"{_repository(model)}/load", self._host, read=_read_nothing, body=body)

    def unload(self, model: str) -> Page[None]:
        """Unload a model."""
        return Page("POST", f"{_repository(model)}/unload", self._host, read=_read_nothing, body={})

    def index(self, *, ready: bool) -> Page[list[IndexEntry]]:
        """The repository's index, a POST that only reads."""
        return Page(
            "POST",
            "/v2/repository/index",
            self._host,
            read=_read_index,
            body={"ready": ready},
            repeatable=True,
        )

    def statistics(self, model: str | None, version: str | int | None) -> Page[list[ModelStatistics]]:
        """What models did since they were loaded."""
        path = "/v2/models/stats" if model is None else f"{model_path(model, version)}/stats"
        return Page("GET", path, self._host, read=_read_statistics)

    def register(self, region: str, size_bytes: int) -> Page[None]:
        """Lend the daemon a shared memory region."""
        body = {"key": f"/{region}", "offset": 0, "byte_size": size_bytes}
        return Page("POST", f"{_region(region)}/register", self._host, read=_read_nothing, body=body)

    def unregister(self, region: str) -> Page[None]:
        """Take it back; doing so twice is the same as once."""
        return Page(
            "POST", f"{_region(region)}/unregister", self._host, read=_read_nothing, body={}, repeatable=True
        )

    def regions(self) -> Page[set[str]]:
        """The names of the regions that the daemon has."""
        return Page("GET", "/v2/systemsharedmemory/status", self._host, read=_read_regions)


def _repository(model: str) -> str:
    return f"/v2/repository/models/{quote(model, safe='')}"


def _region(region: str) -> str:
    return f"/v2/systemsharedmemory/region/{quote(region, safe='')}"


def _read_any(document: Any) -> Any:  # noqa: ANN401 - parsed JSON
    return document


def _read_object(document: Any) -> dict[str, Any]:  # noqa: ANN401 - parsed JSON
    if not isinstance(document, dict):
        raise InternalError(f"response: expected a JSON object, got {type(document).__name__}")
    return document


def _read_nothing(_: object) -> None:
    """The status says it all."""


def _read_yes(document: Any) -> bool:  # noqa: ANN401 - parsed JSON
    """The status decides (Triton's body is empty); KServe says it in JSON as well."""
    return all(_read_object(document).get(word, True) for word in ("live", "ready"))


def _read_index(document: Any) -> list[IndexEntry]:  # noqa: ANN401 - parsed JSON
    return [
        IndexEntry(
            entry["name"],
            str(entry.get("version", "")),
            entry.get("state", "UNKNOWN"),
            entry.get("reason", ""),
        )
        for entry in document
    ]


def _read_statistics(document: Any) -> list[ModelStatistics]:  # noqa: ANN401 - parsed JSON
    statistics: list[ModelStatistics] = document["model_stats"]
    return statistics


def _read_regions(document: Any) -> set[str]:  # noqa: ANN401 - parsed JSON
    return {entry["name"] for entry in document}
