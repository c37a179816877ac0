"""The daemon's first lines: `python -m agent.start [--home DIR]`, which `skerry run` becomes.

Does: start the child that takes longest to import, read the configuration, keep out of memory what nobody needs (in
that order), then become the daemon.
Leaves out: the daemon (agent.daemon), what is kept out (agent.lean).
"""

from __future__ import annotations

import os
import sys

from agent import lean
from providers import cores
from providers.spawn import spawn_zygote
from skerry.errors import ConfigError, SkerryError


def main() -> int:
    """Run the daemon; returns its exit status."""
    # Two words of command line are not worth argparse, which would stay in memory for good.
    arguments = sys.argv[1:]
    home = arguments[1] if len(arguments) == 2 and arguments[0] == "--home" else None
    if arguments and home is None:
        print(f"error: expected [--home DIR], got {' '.join(arguments)}", file=sys.stderr)  # noqa: T201 - as below
        return 2
    try:
        cores.check_core()
        zygote = spawn_zygote()
    except ConfigError:  # the daemon says it again, and how to repair it
        zygote = None
    lean.tune_allocator()
    lean.import_libraries()
    from agent import config as configuration  # noqa: PLC0415 - not before msgspec, and before what is large
    from agent import paths as places  # noqa: PLC0415 - likewise

    try:
        cores.check_core()
        paths = places.resolve(home, os.environ, os.geteuid())
        # Before the daemon is imported, which then gets the memory that reading took.
        with lean.reading_yaml():
            config = configuration.load(paths.config_file)
        from agent import daemon  # noqa: PLC0415 - see above

        daemon.run(paths, config, zygote)
    except SkerryError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201 - the command line's answer
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201 - likewise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
