"""What the daemon tells its gateway on the command line, as JSON."""

from __future__ import annotations

import msgspec


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's part of the configuration.

    Attributes:
        daemon: path of the daemon's HTTP socket.
        inner: path for gRPC's own socket; its directory is made, for this user alone.
        log_level: as in `log.level`.
        max_body_bytes: of `ipc`, like the four below.
        max_connections: clients.
        header_timeout_s: for the first bytes of a connection.
        idle_timeout_s: after which a connection without calls is closed.
        drain_s: how long calls under way may take when the gateway stops.
    """

    daemon: str
    inner: str
    log_level: str
    max_body_bytes: int
    max_connections: int
    header_timeout_s: float
    idle_timeout_s: float
    drain_s: float
