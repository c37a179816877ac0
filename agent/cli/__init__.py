"""The command line: `skerry [--home DIR] COMMAND …`.

`skerry run` is how systemd starts the daemon, and the daemon's process shall carry none of the command
line's libraries: `main` replaces itself with the daemon before it imports any of them.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the `skerry` script."""
    arguments = sys.argv[1:]
    if arguments == ["run"] or (arguments[:1] == ["--home"] and arguments[2:] == ["run"]):
        run_daemon(arguments[1] if len(arguments) > 1 else None)
    # Everything else, a misspelt or unusual `run` included, is for the parser to judge.
    from agent.cli.app import main as parse_and_run  # noqa: PLC0415 - not for the daemon, see above

    parse_and_run()


def run_daemon(home: str | None) -> None:
    """Become the daemon: same process id, so that systemd and a supervisor watch the right one."""
    # -P: a folder named `agent` in the working directory is not ours.
    command = [sys.executable, "-P", "-m", "agent.start"]
    if home is not None:
        command += ["--home", home]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - a list, no shell
