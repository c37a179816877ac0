"""Skerry, an edge inference agent: the public face (vocabulary, errors, protocol codec, client).

`from skerry import AsyncClient, Client` works; the daemon, which imports this package as well, does not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skerry.asyncclient import AsyncClient
    from skerry.client import Client

__all__ = ["AsyncClient", "Client", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The clients, imported when they are asked for: they bring numpy."""
    if name == "Client":
        from skerry.client import Client  # noqa: PLC0415 - see above

        return Client
    if name == "AsyncClient":
        from skerry.asyncclient import AsyncClient  # noqa: PLC0415 - see above

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
