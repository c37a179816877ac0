"""Every key of skerry.yaml: its type, its default, its range, its meaning, and whether it reloads.

Does: the typed configuration that the rooms are handed, and the table that describes it.
Leaves out: files and YAML (agent.config), paths (agent.paths).

Rules
 * This is the one copy of each fact: docs/configuration.md, `skerry config show`, validation and the
   reload rules are all derived from the fields below.
 * A field's name is its key plus its unit: `timeout_s` is the key `timeout`, in seconds here and with any
   unit in the file; `_bytes` likewise; `socket_mode` is octal in the file.
 * A key reloads only if the daemon applies it without a restart.
"""

from __future__ import annotations

import functools
import typing
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from skerry.terms import GIB, KIB, MIB

_DAY_S = 86400.0
_UNITS = ("_s", "_bytes")


def _key(
    meaning: str, *, reload: bool = False, ge: float | None = None, le: float | None = None, accepts: str = ""
) -> msgspec.Meta:
    """Describe a field: one line of meaning; `ge` and `le` in the unit of the field.

    `accepts` says what it takes where its type does not.
    """
    return msgspec.Meta(description=meaning, extra={"reload": reload, "accepts": accepts}, ge=ge, le=le)


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """One block of the file."""


class Log(Section, frozen=True):
    """What the daemon writes to standard error, which systemd keeps in the journal."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], _key("least severity that is written", reload=True)
    ] = "info"


class Ipc(Section, frozen=True):
    """The local listeners and what a client may ask of them."""

    socket_mode: Annotated[
        int,
        _key(
            "permissions of the Unix socket, octal; connecting needs write; a socket unit has its own",
            ge=0o600,
            le=0o666,
        ),
    ] = 0o660
    socket_group: Annotated[
        str | None, _key("group that owns the Unix socket; null: the daemon's; a socket unit has its own")
    ] = None
    tcp: Annotated[
        str | None, _key("HOST:PORT of an additional TCP listener, such as '127.0.0.1:8000'; null: none")
    ] = None
    tcp_expose: Annotated[
        bool, _key("let `ipc.tcp` be an address other than loopback; there is no authentication on TCP")
    ] = False
    max_body_bytes: Annotated[int, _key("largest request body", reload=True, ge=KIB, le=128 * MIB)] = 64 * MIB
    max_header_bytes: Annotated[int, _key("largest HTTP request head", reload=True, ge=KIB, le=MIB)] = (
        16 * KIB
    )
    max_connections: Annotated[
        int, _key("open connections; further ones get 503 and are closed", reload=True, ge=1, le=65536)
    ] = 1024
    # Three quarters: whatever one user does, a quarter is left for the others.
    connections_per_uid: Annotated[
        int, _key("open connections of one user; 0: no limit", reload=True, ge=0, le=65536)
    ] = 768
    requests_per_uid: Annotated[
        int,
        _key(
            "requests of one user in progress; further ones get 503; 0: no limit", reload=True, ge=0, le=65536
        ),
    ] = 192
    memory_per_uid_bytes: Annotated[
        int,
        _key(
            "memory for one user's bodies of 32 KiB and more; a lone one always passes; 0: no limit",
            reload=True,
            ge=0,
            le=64 * GIB,
        ),
    ] = 128 * MIB
    rate_per_uid: Annotated[
        float, _key("inference requests per second of one user; 0: no limit", reload=True, ge=0, le=1_000_000)
    ] = 0.0
    header_timeout_s: Annotated[
        float, _key("longest time for a request head to arrive", reload=True, ge=0.1, le=3600)
    ] = 10.0
    body_timeout_s: Annotated[
        float, _key("longest time for a request body to arrive", reload=True, ge=0.1, le=_DAY_S)
    ] = 60.0
    idle_timeout_s: Annotated[
        float, _key("a connection without a request is closed after this", reload=True, ge=1, le=_DAY_S)
    ] = 300.0
    lend: Annotated[
        bool,
        _key(
            "lend the connection of a client that repeats one request to the worker of a quick model, which then"
            " answers by itself",
            reload=True,
        ),
    ] = True


class Grpc(Section, frozen=True):
    """The gRPC listener, `grpc.sock` beside the HTTP socket, with the mode, group and limits of `ipc`."""

    enabled: Annotated[
        Literal["auto", "on", "off"],
        _key("auto: when the first client comes, if grpcio is installed; on: from the start"),
    ] = "auto"


class Access(Section, frozen=True):
    """Who may do what: access.md says more."""

    rules: Annotated[
        tuple[str, ...],
        _key(
            "the first that matches decides; where none does, root and the daemon's user may do everything, its"
            " group and the socket's may infer and read",
            reload=True,
            accepts="a list of rules such as 'allow infer,read gid:staff model:face-*'",
        ),
    ] = ()
    tcp: Annotated[
        tuple[Literal["infer", "read", "admin"], ...],
        _key(
            "what a client on `ipc.tcp` may do where no rule decides",
            reload=True,
            accepts="a list of infer, read, admin",
        ),
    ] = ("infer", "read")


class Inference(Section, frozen=True):
    """What a request may take."""

    timeout_s: Annotated[
        float, _key("longest time for an answer, waiting included", reload=True, ge=0.01, le=_DAY_S)
    ] = 30.0
    queue: Annotated[
        int, _key("requests waiting or running per model; further ones get 503", reload=True, ge=1, le=65536)
    ] = 256
    drain_s: Annotated[
        float, _key("how long a stop or a swap waits for running requests", reload=True, ge=0, le=3600)
    ] = 10.0


class Models(Section, frozen=True):
    """Which models are in memory, and for how long."""

    load: Annotated[
        Literal["eager", "lazy"],
        _key("eager: a model is loaded when it comes; lazy: by its first request", reload=True),
    ] = "eager"
    memory_bytes: Annotated[
        int,
        _key(
            "most memory of loaded models together; the ones unused for longest make room; 0: no limit",
            reload=True,
            ge=0,
            le=64 * 1024 * GIB,
        ),
    ] = 0
    keep_alive_s: Annotated[
        float,
        _key(
            "a model unused for so long leaves memory until its next request; 0: never;"
            " the manifest's `keep_alive` comes first",
            reload=True,
            ge=0,
            le=365 * _DAY_S,
        ),
    ] = 0.0


class Workers(Section, frozen=True):
    """The processes that run models."""

    start: Annotated[
        Literal["fork", "spawn"], _key("fork: from a warm process, in milliseconds; spawn: each afresh")
    ] = "fork"
    threads: Annotated[int, _key("threads per model; 0: usable cores, at most 4", ge=0, le=256)] = 0
    crashes: Annotated[
        int, _key("crashes within `workers.crash_window` that quarantine a model", reload=True, ge=1, le=1000)
    ] = 3
    crash_window_s: Annotated[
        float, _key("time in which crashes are counted", reload=True, ge=1, le=_DAY_S)
    ] = 60.0
    load_timeout_s: Annotated[
        float, _key("longest time for a model to load and warm up", reload=True, ge=1, le=_DAY_S)
    ] = 60.0
    kill_grace_s: Annotated[
        float, _key("time between asking a run to end and killing its worker", reload=True, ge=0, le=60)
    ] = 1.0


class Providers(Section, frozen=True):
    """What may execute models."""

    policy: Annotated[
        Literal["max_efficiency", "prefer_cpu", "prefer_gpu", "prefer_npu"],
        _key("how devices are ranked; applies to the next placement of a model", reload=True),
    ] = "max_efficiency"
    plugins: Annotated[
        tuple[str, ...],
        _key("plugin packages of the catalogue that may be loaded; []: all that are installed"),
    ] = ()
    discovery_timeout_s: Annotated[
        float, _key("longest time for the child process that lists devices", ge=1, le=600)
    ] = 20.0


class Cache(Section, frozen=True):
    """Remembered answers, for the models whose manifest asks for it."""

    enabled: Annotated[bool, _key("whether answers are remembered at all")] = True
    max_size_bytes: Annotated[
        int, _key("most bytes of answers on disk", reload=True, ge=MIB, le=1024 * GIB)
    ] = 256 * MIB
    memory_bytes: Annotated[
        int, _key("most bytes of answers in memory, in front of the disk", reload=True, ge=0, le=64 * GIB)
    ] = 2 * MIB


class Inbox(Section, frozen=True):
    """The directory from which signed bundles are imported."""

    enabled: Annotated[bool, _key("whether the directory is watched")] = True


class Registry(Section, frozen=True):
    """Which signed models this node believes, and for how long."""

    channel: Annotated[
        str | None,
        _key(
            "the signed channel document that says which versions run here; null: every model that is signed",
            reload=True,
        ),
    ] = None
    clock: Annotated[
        Literal["kernel", "trusted"],
        _key(
            "whose word counts that the clock is right, by which expiry is judged: the kernel's, or yours (trusted)",
            reload=True,
        ),
    ] = "kernel"
    max_staleness_s: Annotated[
        float,
        _key(
            "stop serving when the signed metadata has been expired for so long; 0: never",
            reload=True,
            ge=0,
            le=36500 * _DAY_S,
        ),
    ] = 0.0
    scrub_s: Annotated[
        float,
        _key(
            "how often all installed files are read again, when nothing else is to be done, and compared with what is"
            " signed; 0: never",
            reload=True,
            ge=0,
            le=365 * _DAY_S,
        ),
    ] = _DAY_S


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration.

    `origins` maps a key such as "ipc.max_body", and an entry of a list such as "access.rules[0]", to "FILE:LINE"; a key
    that is not in it has its default.
    """

    log: Log = Log()
    ipc: Ipc = Ipc()
    grpc: Grpc = Grpc()
    access: Access = Access()
    inference: Inference = Inference()
    models: Models = Models()
    workers: Workers = Workers()
    providers: Providers = Providers()
    cache: Cache = Cache()
    registry: Registry = Registry()
    inbox: Inbox = Inbox()
    origins: dict[str, str] = {}


class Key(NamedTuple):
    """One row of the table.

    Attributes:
        name: as in the file, with its section: "ipc.max_body".
        section: "ipc".
        field: attribute of the section's struct: "max_body_bytes".
        unit: "s", "bytes", "octal" or "".
        type: the annotated type, which msgspec checks values against.
        least: smallest number accepted, or None.
        most: largest number accepted, or None.
        default: in the field's unit.
        meaning: one line.
        reloads: whether a change applies without a restart.
        accepts: what it takes, in words; empty where type and range say it.
    """

    name: str
    section: str
    field: str
    unit: str
    type: Any
    least: float | None
    most: float | None
    default: Any
    meaning: str
    reloads: bool
    accepts: str


def sections() -> dict[str, type[Section]]:
    """Section name -> its struct, in the order of the file."""
    hints = typing.get_type_hints(Config)
    return {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Section)
    }


@functools.cache
def keys() -> dict[str, Key]:
    """Every key by name, in the order of the file."""
    found = [
        _describe(section, field, hint, struct)
        for section, struct in sections().items()
        for field, hint in typing.get_type_hints(struct, include_extras=True).items()
    ]
    return {key.name: key for key in found}


def value_of(config: Config, key: Key) -> Any:  # noqa: ANN401 - a key's value has the key's type
    """What `config` says for `key`, in the field's unit."""
    return getattr(getattr(config, key.section), key.field)


def _describe(section: str, field: str, hint: Any, struct: type[Section]) -> Key:  # noqa: ANN401 - a type form
    meta = typing.get_args(hint)[1]
    suffix = next((unit for unit in _UNITS if field.endswith(unit)), "")
    return Key(
        name=f"{section}.{field.removesuffix(suffix)}",
        section=section,
        field=field,
        unit="octal" if field == "socket_mode" else suffix.removeprefix("_"),
        type=hint,
        least=meta.ge,
        most=meta.le,
        default=getattr(struct(), field),
        meaning=meta.description,
        reloads=meta.extra["reload"],
        accepts=meta.extra["accepts"],
    )
