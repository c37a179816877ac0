"""Triton's logging extension: read and change what the running daemon logs.

Leaves out: the settings themselves (agent.logs).

Source: extension_logging.md of triton-inference-server, which writes log_warning and log_warnings: both are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from agent.ipc.pages.content import Content, Handler, json, parse
from agent.ipc.routes import Page
from skerry.errors import Unsupported

if TYPE_CHECKING:
    from agent.ipc.head import Head
    from agent.ipc.peer import Peer
    from agent.logs import LogSettings


class _Update(msgspec.Struct, forbid_unknown_fields=True):
    """What is None stays as it is."""

    log_file: str | None = None
    log_info: bool | None = None
    log_warning: bool | None = None
    log_warnings: bool | None = None
    log_error: bool | None = None
    log_errors: bool | None = None
    log_verbose_level: Annotated[int, msgspec.Meta(ge=0, le=1000)] | None = None
    log_format: Literal["default", "ISO8601"] | None = None


class Logs:
    """The pages of the extension."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {Page.LOGGING: self._read, Page.SET_LOGGING: self._change}

    def _read(self, _head: Head, _body: bytes, _peer: Peer) -> Content:
        settings = self._settings
        return json(
            {
                "log_file": "",
                "log_info": settings.info,
                "log_warning": settings.warning,
                "log_error": settings.error,
                "log_verbose_level": settings.verbose,
                "log_format": settings.format,
            }
        )

    def _change(self, head: Head, body: bytes, peer: Peer) -> Content:
        update = parse(body, _Update, "log settings")
        if update.log_file:
            raise Unsupported(
                f"log settings: expected no log_file, got {update.log_file[:100]!r}",
                "the daemon writes to standard error; under systemd, read it with: journalctl -u skerry",
            )
        self._settings.change(
            info=update.log_info,
            warning=_either(update.log_warning, update.log_warnings),
            error=_either(update.log_error, update.log_errors),
            verbose=update.log_verbose_level,
            format=update.log_format,
        )
        return self._read(head, body, peer)


def _either(one: bool | None, other: bool | None) -> bool | None:
    return other if one is None else one
