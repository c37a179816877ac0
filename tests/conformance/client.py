"""The client that TUF's conformance suite drives: our checks and our memory behind the suite's command line.

Does: init, refresh and download as https://github.com/theupdateframework/tuf-conformance/blob/main/CLIENT-CLI.md has
them; HTTP.
Leaves out: every decision. store.trust walks and verifies, store.ledger remembers the floors, store.blobs compares
what is downloaded with what was signed; python-tuf does where that is no sha256, which no model of ours has.

Rules
 * What Skerry asks beyond TUF is off, because the suite has repositories without it: that roots promise consistent
   snapshots, and that time does not stand before this program's release.
 * In the metadata folder lie, for the suite, ROLE.json of what is trusted, and below `.skerry` what a node keeps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

from tuf.api.exceptions import LengthOrHashMismatchError

from skerry.errors import NotFound, SkerryError, Untrusted
from store import durable, trust
from store.blobs import CHUNK_BYTES, BlobStore, Content
from store.ledger import Ledger
from store.timekeeping import trusted_clock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuf.api.metadata import TargetFile

ABSENT = {403, 404}


class Node:
    """What is kept between two commands."""

    def __init__(self, metadata_dir: Path) -> None:
        self.roles = metadata_dir
        self.files = metadata_dir / ".skerry" / "metadata"
        self.ledger = Ledger(metadata_dir / ".skerry" / "state.db")
        self.blobs = BlobStore(metadata_dir / ".skerry" / "blobs")

    def init(self, root: bytes) -> None:
        durable.make_dir(self.files)
        self.keep(f"{json.loads(root)['signed']['version']}.root.json", root)

    def keep(self, name: str, data: bytes) -> None:
        """Write a verified file down, for the next command and for the suite."""
        durable.write(self.files / name, data)
        first, _, rest = name.partition(".")
        durable.write(self.roles / (rest if first.isdecimal() and rest != "json" else name), data)

    def refresh(self, url: str) -> trust.Client:
        """A client whose top-level metadata is fresh; what was verified is kept, also where a later step failed."""
        client = trust.Client(
            trust.read_roots(self.files),
            trust.Source(url, lambda name, limit: _get(f"{url}/{quote(name, safe='%')}", limit)),
            reference=trusted_clock().wall,
            floors=self.ledger.read().floors,
            installed=self._installed(),
            on_root=self.keep,
            consistent=False,
        )
        try:
            client.refresh()
        finally:
            self.remember(client)
        return client

    def remember(self, client: trust.Client) -> None:
        for name, data in client.files.items():
            self.keep(name, data)
        self.ledger.record(at_unix=trusted_clock().wall.timestamp(), floors=client.seen)

    def _installed(self) -> dict[str, bytes]:
        """Files that keep their names from version to version are left out: only the source has the right one."""
        names = [name for name in durable.names(self.files) if name.partition(".")[0].isdecimal()]
        return {name: (self.files / name).read_bytes() for name in names if not name.endswith(".root.json")}

    def download(self, client: trust.Client, path: str, url: str, folder: Path) -> None:
        try:
            found = client.lookup(path)
        finally:
            self.remember(client)
        if found is None:
            raise NotFound(f"{path}: nobody signed this target")
        place = folder / quote(path, safe="")
        if not place.exists() or not _is(found.target, place.read_bytes()):
            prefixed = client.trusted().root.consistent_snapshot
            name = quote(_published(found.target, prefixed=prefixed))
            durable.write(place, self._fetch(found.target, f"{url}/{name}"))

    def _fetch(self, target: TargetFile, url: str) -> bytes:
        if "sha256" in target.hashes:
            content = Content(f"sha256:{target.hashes['sha256']}", target.length)
            self.blobs.ingest(_chunks(url), content)
            return b"".join(self.blobs.verified_chunks(*content))
        data = _get(url, target.length) or b""
        if not _is(target, data):
            raise Untrusted(f"{target.path}: expected the bytes that were signed, got others")
        return data


def _is(target: TargetFile, data: bytes) -> bool:
    try:
        target.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


def _published(target: TargetFile, *, prefixed: bool) -> str:
    folder, slash, base = target.path.rpartition("/")
    return f"{folder}{slash}{next(iter(target.hashes.values()))}.{base}" if prefixed else target.path


def _get(url: str, limit_bytes: int) -> bytes | None:
    try:
        with urlopen(url) as answer:  # noqa: S310 - the suite's own server
            return answer.read(limit_bytes + 1)
    except HTTPError as error:
        if error.code in ABSENT:
            return None
        raise


def _chunks(url: str) -> Iterator[bytes]:
    with urlopen(url) as answer:  # noqa: S310 - the suite's own server
        while chunk := answer.read(CHUNK_BYTES):
            yield chunk


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append")
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    given = parser.parse_args()
    node = Node(given.metadata_dir)
    try:
        if given.command == "init":
            node.init(given.trusted_root.read_bytes())
            return 0
        client = node.refresh(given.metadata_url.rstrip("/"))
        for name in given.target_name or [] if given.command == "download" else []:
            node.download(client, name, given.target_base_url.rstrip("/"), given.target_dir)
    except (SkerryError, OSError) as error:
        sys.stderr.write(f"{given.command}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
