"""The daemon's first lines: `python -m agent.start [--home DIR]`, which `skerry run` becomes.

Does: start the child that takes longest to import, keep out of memory what nobody needs, then become the daemon.
Leaves out: the daemon (agent.daemon).
"""

from __future__ import annotations

import sys

from providers import cores
from providers.spawn import spawn_zygote
from skerry.errors import ConfigError


def main() -> int:
    """Run the daemon; returns its exit status."""
    try:
        cores.check_core()
        zygote = spawn_zygote()
    except ConfigError:  # the daemon says it again, and how to repair it
        zygote = None
    # msgspec imports typing_extensions where some other package has brought it, and needs nothing of it that the
    # standard library has not: 3 MB and 10 ms.
    sys.modules["typing_extensions"] = None  # type: ignore[assignment] # the documented way to make an import fail
    import msgspec  # noqa: F401, PLC0415 - see above

    del sys.modules["typing_extensions"]
    from agent import daemon  # noqa: PLC0415 - likewise

    return daemon.main(zygote)


if __name__ == "__main__":
    sys.exit(main())
