"""The short-lived child that verifies the registry for the daemon, which never loads tuf (18 MB) itself.

    python -m store.verify REGISTRY KEYS [--import BUNDLE]

Does: optionally import a bundle, then verify everything signed, and print one JSON document (store.listing)
on stdout. Exit status 0 with a listing, 1 with a refusal.
Leaves out: reading blobs, which are hashed when they are loaded; admitting old bundles again, which is for
people to decide.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from skerry.errors import SkerryError
from store import listing
from store.registry import Registry


def main(arguments: list[str]) -> int:
    """Do what the module says; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m store.verify", description="Verify a registry.")
    parser.add_argument("registry", type=Path)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--import", type=Path, dest="bundle")
    options = parser.parse_args(arguments)
    registry = Registry(options.registry, options.keys)
    try:
        if options.bundle:
            from store import bundle  # noqa: PLC0415 - seldom needed, and start-up waits for this child

            bundle.import_bundle(registry, options.bundle)
        document: listing.Listing | listing.Refusal = registry.listing()
    except SkerryError as error:
        document = listing.refusal(error)
    sys.stdout.buffer.write(listing.encode(document) + b"\n")
    return 0 if isinstance(document, listing.Listing) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
