"""Every call but inference and health, as the page of the daemon that answers it.

Does: request message -> method, path and JSON; the page's JSON -> response message.
Leaves out: asking (agent.rpc.service), the pages themselves (agent.ipc).

Rules
 * The daemon decides; what it refuses is refused here with its words.
 * A page may say more than the messages have fields for: what they lack is left out.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import msgspec
from google.protobuf import json_format

from agent.rpc.codec import model_path
from agent.rpc.schema import INFERENCE
from skerry.errors import InternalError, InvalidRequest, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

Message = Any  # made at run time, see Schema
_encode = msgspec.json.Encoder().encode


class Question(NamedTuple):
    """What to ask the daemon. `changes`: doing it twice is not the same as once."""

    method: str
    path: str
    json: bytes = b""
    changes: bool = False


class Page(NamedTuple):
    """One call.

    Attributes:
        request: class of the request message.
        response: class of the response message.
        ask: request -> question; None: the answer needs no daemon.
        tell: the page's JSON -> the response as protobuf's JSON.
    """

    request: Any
    response: Any
    ask: Callable[[Message], Question | None]
    tell: Callable[[Any], dict[str, Any]]

    def read(self, json: bytes) -> Message:
        """The page -> the response message.

        Raises:
            InternalError: the page does not have the form that the protocol gives it.
        """
        response = self.response()
        try:
            document = self.tell(msgspec.json.decode(json)) if json else {}
            json_format.ParseDict(document, response, ignore_unknown_fields=True)
        except (json_format.ParseError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InternalError(f"page: expected {self.response.DESCRIPTOR.name}, got {error}") from error
        return response


def _same(document: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever the page is
    return dict(document)


def _nothing(_: object) -> dict[str, Any]:
    return {}


def _of_model(page: str) -> Callable[[Message], Question]:
    return lambda request: Question("GET", f"/v2/{model_path(request.name, request.version)}{page}")


def _statistics(request: Message) -> Question:
    return _of_model("/stats")(request) if request.name else Question("GET", "/v2/models/stats")


# -- model repository


def _index(request: Message) -> Question:
    repository = f"/{quote(request.repository_name, safe='')}" if request.repository_name else ""
    return Question("POST", f"/v2/repository{repository}/index", _encode({"ready": request.ready}))


def _change(verb: str) -> Callable[[Message], Question]:
    def ask(request: Message) -> Question:
        if request.repository_name:
            raise Unsupported(
                f"model repository {request.repository_name!r}: expected none to be named; this node has one",
            )
        parameters = {name: _plain(value) for name, value in request.parameters.items()}
        path = f"/v2/repository/{model_path(request.model_name, '')}/{verb}"
        return Question("POST", path, _encode({"parameters": parameters}), changes=True)

    return ask


def _plain(parameter: Message) -> object:
    choice = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, choice) if choice else None
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


# -- shared memory


def _region(name: str) -> str:
    return f"/region/{quote(name, safe='')}" if name else ""


def _regions_of(request: Message) -> Question:
    return Question("GET", f"/v2/systemsharedmemory{_region(request.name)}/status")


def _register(request: Message) -> Question:
    if not request.name:
        raise InvalidRequest("shared memory region: expected a name, got none")
    document = {"key": request.key, "offset": request.offset, "byte_size": request.byte_size}
    path = f"/v2/systemsharedmemory{_region(request.name)}/register"
    return Question("POST", path, _encode(document), changes=True)


def _unregister(request: Message) -> Question:
    return Question("POST", f"/v2/systemsharedmemory{_region(request.name)}/unregister", changes=True)


def _regions(document: list[dict[str, Any]]) -> dict[str, Any]:
    return {"regions": {region["name"]: region for region in document}}


def _no_cuda(request: Message) -> Question:
    raise Unsupported(
        f"CUDA shared memory region {request.name!r}: this server has none", "use system shared memory"
    )


def _no_question(_: Message) -> None:
    """Clients ask for the state of CUDA memory, and unregister all of it, before they use any: there is none."""


# -- trace and log settings


def _trace(request: Message) -> Question:
    model = f"/{model_path(request.model_name, '')}" if request.model_name else ""
    path = f"/v2{model}/trace/setting"
    if not request.settings:
        return Question("GET", path)
    settings = {name: _trace_value(name, list(setting.value)) for name, setting in request.settings.items()}
    return Question("POST", path, _encode(settings), changes=True)


def _trace_value(name: str, values: list[str]) -> object:
    """Levels are a list, the others one text each; no value clears the setting."""
    if not values:
        return None
    if name == "trace_level":
        return values
    if len(values) > 1:
        raise InvalidRequest(f"trace setting {name!r}: expected one value, got {len(values)}")
    return values[0]


def _traced(document: dict[str, Any]) -> dict[str, Any]:
    return {"settings": {name: {"value": _texts(value)} for name, value in document.items()}}


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _log(request: Message) -> Question:
    if not request.settings:
        return Question("GET", "/v2/logging")
    settings = {}
    for name, setting in request.settings.items():
        choice = setting.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"log setting {name!r}: expected a value, got none")
        settings[name] = getattr(setting, choice)
    return Question("POST", "/v2/logging", _encode(settings), changes=True)


def _logged(document: dict[str, Any]) -> dict[str, Any]:
    return {"settings": {name: {_log_field(value): value} for name, value in document.items()}}


def _log_field(value: object) -> str:
    if isinstance(value, bool):
        return "bool_param"
    return "uint32_param" if isinstance(value, int) else "string_param"


def _page(
    name: str, ask: Callable[[Message], Question | None], tell: Callable[[Any], dict[str, Any]] = _same
) -> tuple[str, Page]:
    return name, Page(INFERENCE[f"{name}Request"], INFERENCE[f"{name}Response"], ask, tell)


#: By the name of the call.
PAGES: dict[str, Page] = dict(
    [
        _page("ServerMetadata", lambda _: Question("GET", "/v2")),
        _page("ModelMetadata", _of_model("")),
        _page("ModelConfig", _of_model("/config"), lambda document: {"config": document}),
        _page("ModelStatistics", _statistics),
        _page("RepositoryIndex", _index, lambda models: {"models": models}),
        _page("RepositoryModelLoad", _change("load"), _nothing),
        _page("RepositoryModelUnload", _change("unload"), _nothing),
        _page("SystemSharedMemoryStatus", _regions_of, _regions),
        _page("SystemSharedMemoryRegister", _register, _nothing),
        _page("SystemSharedMemoryUnregister", _unregister, _nothing),
        _page("CudaSharedMemoryStatus", _no_question),
        _page("CudaSharedMemoryRegister", _no_cuda),
        _page("CudaSharedMemoryUnregister", _no_question),
        _page("TraceSetting", _trace, _traced),
        _page("LogSettings", _log, _logged),
    ]
)
