"""python-tuf's checks without its I/O. The one module that knows python-tuf's private parts.

The checks are only to be had from a private module; the dependency is pinned below the next major version, and
tests/store/test_trust.py notices if it moves. Its package begins by importing an HTTP client, which nothing here needs
and which every start of the daemon would wait for (0.21 s of processor time against 0.13), so an empty package stands
in for it.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import tuf

_package = types.ModuleType("tuf.ngclient")
_package.__path__ = [str(Path(folder) / "ngclient") for folder in tuf.__path__]
sys.modules.setdefault("tuf.ngclient", _package)

from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet  # noqa: E402 - only now
from tuf.ngclient.config import EnvelopeType  # noqa: E402 - likewise

__all__ = ["EnvelopeType", "TrustedMetadataSet"]
