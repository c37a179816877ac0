"""The short-lived child that verifies the registry for the daemon, which never loads tuf (18 MB) itself.

    python -m store.verify REGISTRY KEYS STATE_DB ROOT [--trust-clock] [--channel GROUP] [--import BUNDLE]

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
from store.places import Places
from store.registry import Registry
from store.timekeeping import kernel_clock, trusted_clock


def main(arguments: list[str]) -> int:
    """Do what the module says; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m store.verify", description="Verify a registry.")
    for place in Places._fields:
        parser.add_argument(place, type=Path)
    parser.add_argument("--trust-clock", action="store_true")
    parser.add_argument("--channel", default="")
    parser.add_argument("--import", type=Path, dest="bundle")
    options = parser.parse_args(arguments)
    places = Places(*(getattr(options, place) for place in Places._fields))
    registry = Registry(places, clock=trusted_clock if options.trust_clock else kernel_clock)
    try:
        registry.settle()
        if options.bundle:
            from store import bundle  # noqa: PLC0415 - seldom needed, and start-up waits for this child

            bundle.import_bundle(registry, options.bundle)
        document: listing.Listing | listing.Refusal = registry.listing(options.channel)
    except SkerryError as error:
        document = listing.refusal(error)
    sys.stdout.buffer.write(listing.encode(document) + b"\n")
    return 0 if isinstance(document, listing.Listing) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
