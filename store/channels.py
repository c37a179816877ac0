"""What shall run, as opposed to what is valid: a signed document per group of nodes.

Does: its shape and its text; find one in a verified chain; keep from a listing what it does not name.
Leaves out: who may sign it (store.delegations), signing one (store.stock).

The document is the target `channels/GROUP.json`. Its text also stands in the target's custom part, so that nothing has
to be fetched beside the metadata. Whoever holds its key can choose among valid models, and can make none valid.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Annotated

import msgspec
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import InvalidRequest, TooLarge, Untrusted
from skerry.terms import KIB, MAX_VERSION
from store import delegations

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from store.listing import Entry
    from store.trust import Trusted

MAX_DOCUMENT_BYTES = 256 * KIB
FORMAT = 1

_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_Version = Annotated[int, msgspec.Meta(ge=1, le=MAX_VERSION)]


class Channel(msgspec.Struct, frozen=True):
    """Model -> the versions that shall run. Fields that a later Skerry adds are passed over."""

    format: int
    models: dict[str, tuple[_Version, ...]]


def path_of(group: str) -> str:
    """The target path of a group's document.

    Raises:
        InvalidRequest: no group can be called so.
    """
    if not _GROUP.fullmatch(group):
        raise InvalidRequest(
            f"channel: expected 1 to 128 of A-Z a-z 0-9 _ . - and no leading dot, got {group!r}"
        )
    return f"channels/{group}.json"


def find(trusted: Trusted, group: str) -> Channel:
    """The document of a group, as the role signed it that may.

    Raises:
        Untrusted: there is none, or it is not understood.
    """
    path = path_of(group)
    found = delegations.search(path, delegations.among(trusted.roles))
    if found is None:
        raise Untrusted(
            f"channel {group}: expected the signed document {path}, found none",
            "`skerry repo channel set` writes one; `registry.channel` in skerry.yaml names the one to follow",
        )
    return read(path, found.target)


def target(group: str, models: Mapping[str, Sequence[int]]) -> TargetFile:
    """The target that says that a group serves these versions; its bytes are the text in its custom part.

    Raises:
        InvalidRequest: no group can be called so.
        TooLarge: it says too much.
    """
    wanted = {name: tuple(sorted(set(versions))) for name, versions in sorted(models.items())}
    data = msgspec.json.encode(Channel(FORMAT, wanted))
    if len(data) > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"channel {group}: expected at most {MAX_DOCUMENT_BYTES} bytes, got {len(data)}")
    digest = hashlib.sha256(data).hexdigest()
    return TargetFile(len(data), {"sha256": digest}, path_of(group), {"custom": {"channel": data.decode()}})


def read(path: str, target: TargetFile) -> Channel:
    """What a verified target says.

    Raises:
        Untrusted: it is not understood.
    """
    custom = target.custom if isinstance(target.custom, dict) else {}
    text = custom.get("channel")
    data = text.encode(errors="replace") if isinstance(text, str) else b""
    if len(data) > MAX_DOCUMENT_BYTES or hashlib.sha256(data).hexdigest() != target.hashes.get("sha256"):
        raise Untrusted(f"{path}: expected the text that its digest names, got another")
    try:
        channel = msgspec.json.decode(data, type=Channel)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Untrusted(f"{path}: signed, but not understood: {error}") from error
    if channel.format != FORMAT:
        raise Untrusted(f"{path}: expected format {FORMAT}, got {channel.format}", "update Skerry")
    return channel


def chosen(channel: Channel, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries that the channel names."""
    return tuple(entry for entry in entries if entry.version in channel.models.get(entry.name, ()))
