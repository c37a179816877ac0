"""Exit codes, and the one place that turns an error into one.

docs/cli.md lists the same codes for scripts that read them.
"""

from __future__ import annotations

import sys

from skerry.errors import (
    ConfigError,
    Denied,
    InvalidRequest,
    NotFound,
    NotRunning,
    SkerryError,
    Unavailable,
    Unsupported,
    Untrusted,
)

OK = 0
FAILED = 1  # it was tried and did not work: the disk, a model's run, a bug
USAGE = 2  # the command, a file it names or the configuration is wrong; the same as for a misspelt option
NO_DAEMON = 3
NOT_FOUND = 4
DENIED = 5
UNTRUSTED = 6  # a signature, a digest or a version did not hold
UNAVAILABLE = 7  # not ready, overloaded or out of time; trying again may help
INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells count

_CODES: tuple[tuple[type[SkerryError], int], ...] = (
    (InvalidRequest, USAGE),
    (ConfigError, USAGE),
    (Unsupported, USAGE),
    (NotRunning, NO_DAEMON),
    (NotFound, NOT_FOUND),
    (Denied, DENIED),
    (Untrusted, UNTRUSTED),
    (Unavailable, UNAVAILABLE),
)


def exit_code(error: SkerryError) -> int:
    """The exit code of a command that ended with `error`."""
    if isinstance(error.__cause__, PermissionError):  # whatever it was for: another user might be allowed
        return DENIED
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


def report(error: SkerryError) -> int:
    """Write what failed and what to do on stderr; return the exit code."""
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")
    return exit_code(error)
