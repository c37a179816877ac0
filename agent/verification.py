"""Have the registry verified, by a child: tuf costs 18 MB, and untrusted metadata is parsed where it can do no harm.

Leaves out: verifying (store.verify), what becomes of the listing (agent.daemon, agent.models).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from skerry.errors import Unavailable
from store import listing

if TYPE_CHECKING:
    from pathlib import Path

    from agent.paths import Paths
    from agent.settings import Registry

#: The child takes 0.2 s; with a bundle of gigabytes on a slow disk it takes minutes.
TIMEOUT_S = 600.0
#: While models serve, the child goes behind them. Nothing waits for it but the one who added a model.
BACKGROUND_NICE = 10


async def verify(
    paths: Paths, settings: Registry, bundle: Path | None = None, *, in_the_background: bool = False
) -> listing.Listing:
    """What the registry holds for this node, after `bundle`, if there is one, was imported.

    Raises:
        Unavailable: no child could be made.
        SkerryError: the registry or the bundle was refused.
    """
    arguments = [str(place) for place in paths.trust]
    if settings.clock == "trusted":
        arguments.append("--trust-clock")
    if settings.channel:
        arguments.append(f"--channel={settings.channel}")
    if bundle is not None:
        arguments += ["--import", str(bundle)]
    try:
        # Not the event loop's own way: uvloop forks, which for a process of this size takes 2 ms in which nobody is
        # served. This waits for the new program to begin, a quarter of that.
        child = subprocess.Popen(  # noqa: ASYNC220 - see above
            [sys.executable, "-P", "-m", "store.verify", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
    except OSError as error:
        raise Unavailable(f"registry: expected a child that verifies it, got {error}") from error
    if in_the_background:
        with contextlib.suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, child.pid, BACKGROUND_NICE)
    try:
        output, _ = await asyncio.wait_for(asyncio.to_thread(child.communicate), TIMEOUT_S)
    except TimeoutError:
        raise Unavailable(f"registry: expected it verified within {TIMEOUT_S:g} s, got no answer") from None
    finally:
        if child.poll() is None:  # too late, or the daemon stops
            child.kill()
            await asyncio.shield(
                asyncio.to_thread(child.wait)
            )  # on a disk that hangs, it takes a while to die
    return listing.parse(output)
