"""Documents that wait for signatures, in the folder `pending/`: one file per role.

Does: read, write, drop them; note in each for whom it waits, so that who signs it elsewhere can be told.
Leaves out: whether a document is complete (store.settling).

Rules
 * The note is beside the signed part and proves nothing; what counts is what the repository's own documents say.
 * There is one draft per role. A change to what waits is a change to the draft, and voids its signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from tuf.api.metadata import Key, Metadata  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import InvalidRequest, NotFound, Untrusted
from store import durable, published, roles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from store.roles import Holders

NOTE = "x-skerry-signers"
#: The longest file that may come back; a targets document with the note.
MAX_DRAFT_BYTES = published.limit_bytes(roles.TARGETS) + 1024 * 1024

Draft = Metadata[Any]


class Drafts:
    """The folder `pending/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, role: str) -> Path:
        """Where the draft of a role lies, or would lie."""
        return self.folder / f"{quote(role, '')}.json"

    def read(self) -> dict[str, Draft]:
        """Role -> draft.

        Raises:
            Untrusted: a file is no such document.
            StorageFailed: it cannot be read.
        """
        found: dict[str, Draft] = {}
        for name in sorted(durable.names(self.folder)):
            if name.endswith(".json") and not name.startswith("."):
                role = unquote(name.removesuffix(".json"))
                found[role] = read(self.folder / name, role)
        return found

    def put(self, role: str, draft: Draft, demands: Sequence[Holders]) -> None:
        """Write a draft, with the note of whose signatures it wants; one that is there already is left alone.

        Raises:
            TooLarge: no client would read it.
            StorageFailed: the disk refused.
        """
        published.check_size(role, roles.encode(draft))
        draft.unrecognized_fields[NOTE] = {
            "role": role,
            "demands": [
                {
                    "threshold": holders.threshold,
                    "keys": {key.keyid: key.to_dict() for key in holders.keys},
                }
                for holders in demands
            ],
        }
        data = roles.encode(draft, bare=False)
        if durable.read(self.path(role), MAX_DRAFT_BYTES) != data:
            durable.make_dir(self.folder)
            durable.write(self.path(role), data)

    def drop(self, role: str) -> None:
        """Remove a draft; one that is not there is fine."""
        durable.remove(self.path(role))


@dataclass(frozen=True, slots=True)
class Note:
    """What a carried draft says about itself, unproven."""

    role: str
    demands: tuple[roles.Holders, ...]

    def keyids(self) -> set[str]:
        """The keys that are asked for."""
        return {key.keyid for holders in self.demands for key in holders.keys}


def read(path: Path, role: str | None = None) -> Draft:
    """A draft, or what came back of one.

    Raises:
        NotFound: no such file.
        Untrusted: it is none.
    """
    data = durable.read(path.resolve(), MAX_DRAFT_BYTES)
    if data is None:
        raise NotFound(f"{path}: expected metadata to be signed, found no such file")
    if role is not None:
        return roles.decode(data, roles.kind_of(role), str(path))
    return roles.decode_any(data, str(path))


def note_of(draft: Draft, where: str) -> Note | None:
    """The note of a draft; None of a file that has none.

    Raises:
        Untrusted: it is not what `Drafts.put` writes.
    """
    note = draft.unrecognized_fields.get(NOTE)
    if note is None:
        return None
    try:
        demands = tuple(
            roles.Holders(
                tuple(Key.from_dict(keyid, dict(fields)) for keyid, fields in demand["keys"].items()),
                int(demand["threshold"]),
            )
            for demand in note["demands"]
        )
        return Note(str(note["role"]), demands)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Untrusted(
            f"{where}: expected a note of whose signatures it wants, got something else"
        ) from error


def same(one: Draft, other: Draft) -> bool:
    """Whether both are copies of one document, whatever their signatures."""
    return one.signed.type == other.signed.type and one.signed_bytes == other.signed_bytes


def require_wanted(note: Note | None, keyid: str, where: str) -> None:
    """Refuse a key that the draft does not ask for.

    Raises:
        InvalidRequest: it does not.
    """
    if note is not None and keyid not in note.keyids():
        asked = ", ".join(sorted(wanted[:12] for wanted in note.keyids()))
        raise InvalidRequest(
            f"{where}: expected one of the keys {asked}, got {keyid[:12]}",
            "this document is not for this key to sign",
        )
