"""What the running daemon logs: the configured level, and what was changed since.

Does: apply severities and the form of the time stamp to the root logger's one handler.
Leaves out: the protocol's names for them (agent.ipc.pages.logs), where the lines go (standard error, always).

Changes last until the daemon ends, or until `log.level` in the file becomes another one.
"""

from __future__ import annotations

import logging
import time
from typing import Literal

from skerry.errors import InternalError

Format = Literal["default", "ISO8601"]

_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SEVERITIES = ("debug", "info", "warning", "error")


class LogSettings:
    """See the module. One per process.

    Attributes:
        verbose: above 0, debug messages are written.
        info, warning, error: whether messages of this severity are written.
        format: of the time stamp; "ISO8601" is in UTC.
    """

    def __init__(self, level: str) -> None:
        self._handler = logging.StreamHandler()
        self._handler.addFilter(self._is_wanted)
        self._level = ""
        self.format: Format = "default"
        self.verbose = 0
        self.info = self.warning = self.error = True
        self.follow(level)

    def install(self) -> None:
        """From now on the process logs here."""
        logging.getLogger().addHandler(self._handler)
        # At the level debug it describes every change of a file, several lines each.
        logging.getLogger("watchdog").setLevel(logging.INFO)

    def follow(self, level: str) -> None:
        """Apply `log.level` of the configuration, if it is another than before."""
        if level == self._level:
            return
        if level not in _SEVERITIES:
            raise InternalError(f"log level: expected one of {', '.join(_SEVERITIES)}, got {level!r}")
        self._level = level
        rank = _SEVERITIES.index(level)
        self.change(verbose=int(rank < 1), info=rank < 2, warning=rank < 3, error=True)

    def change(
        self,
        *,
        verbose: int | None = None,
        info: bool | None = None,
        warning: bool | None = None,
        error: bool | None = None,
        format: Format | None = None,  # noqa: A002 - the setting's name
    ) -> None:
        """Change what is given, at once."""
        self.verbose = self.verbose if verbose is None else verbose
        self.info = self.info if info is None else info
        self.warning = self.warning if warning is None else warning
        self.error = self.error if error is None else error
        self.format = self.format if format is None else format
        self._handler.setFormatter(_formatter(self.format))
        # The logger's own level keeps messages that nobody wants from being made at all.
        logging.getLogger().setLevel(self._least())

    def _least(self) -> int:
        wanted = (
            (logging.DEBUG, self.verbose > 0),
            (logging.INFO, self.info),
            (logging.WARNING, self.warning),
            (logging.ERROR, self.error),
        )
        return min((level for level, on in wanted if on), default=logging.CRITICAL)

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return self.error or record.levelno > logging.ERROR
        if record.levelno >= logging.WARNING:
            return self.warning
        return self.info if record.levelno >= logging.INFO else self.verbose > 0


def _formatter(form: Format) -> logging.Formatter:
    if form == "default":
        return logging.Formatter(_LINE)
    formatter = logging.Formatter(_LINE, "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    return formatter
