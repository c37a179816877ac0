"""python-tuf's checks, and its refusals in our words.

Does: start a set of checks from a root chain; tell key sets apart; translate what it raises.
Leaves out: the order of checks, files, clocks (store.trust).
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tuf.api.exceptions import (
    BadVersionNumberError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)

from skerry.errors import Untrusted
from store.tuflight import EnvelopeType, TrustedMetadataSet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tuf.api.metadata import Root  # type: ignore[attr-defined]  # public there, without __all__


class Unsigned(Untrusted):
    """The signatures do not satisfy the root at hand; another root of the chain may do."""


class Expired(Untrusted):
    """Rightly signed, and too old."""


def start(
    roots: Sequence[bytes], where: str, hint: str = "", *, consistent: bool = True
) -> TrustedMetadataSet:
    """Checks that trust `roots[0]` by itself and each further root by the one before.

    Args:
        roots: oldest first, at least one.
        where: what error messages call them.
        hint: what to do if they do not hold.
        consistent: whether they must promise consistent snapshots. Without these, files keep their names from version
            to version.

    Raises:
        Untrusted: one of them does not hold.
    """
    with refusing(f"{where}: root 1 of {len(roots)}", hint):
        checks = TrustedMetadataSet(roots[0], EnvelopeType.METADATA)
    if consistent:
        _require_consistent(checks, where)
    for number, data in enumerate(roots[1:], 2):
        extend(checks, data, f"{where}: root {number} of {len(roots)}", hint, consistent=consistent)
    return checks


def extend(
    checks: TrustedMetadataSet, root: bytes, where: str, hint: str = "", *, consistent: bool = True
) -> None:
    """Go on to the next root; the arguments are those of `start`.

    Raises:
        Untrusted: it is not signed by the one before and by itself, or not the next one.
    """
    with refusing(where, hint):
        checks.update_root(root)
    if consistent:
        _require_consistent(checks, where)


def fingerprint(root: Root, role: str) -> str:
    """What tells one set of keys from another: "sha256:<hex>" over a role's threshold and public keys.

    The ids of keys are left out, because the file that declares an id is the one that is to be checked.
    """
    appointed = root.roles[role]
    # A root may appoint a key that it does not have; nobody can sign with that one.
    present = [root.keys[keyid] for keyid in appointed.keyids if keyid in root.keys]
    keys = sorted(json.dumps(key.to_dict(), sort_keys=True) for key in present)
    return f"sha256:{hashlib.sha256(json.dumps([appointed.threshold, keys]).encode()).hexdigest()}"


def require_unique_keys(data: bytes, where: str) -> None:
    """Refuse JSON in which an object has a key twice: readers differ in which of the two counts.

    Raises:
        Untrusted: it does, or it is no JSON.
    """

    def refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise Untrusted(f"{where}: expected each key once in an object, got {twice[:200]!r} twice")
        return found

    try:
        json.loads(data, object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        raise Untrusted(f"{where}: not valid: expected JSON, got {str(error)[:200]}") from error


def _require_consistent(checks: TrustedMetadataSet, where: str) -> None:
    if not checks.root.consistent_snapshot:
        raise Untrusted(f"{where}: expected consistent_snapshot true, got false")


@contextmanager
def refusing(where: str, hint: str = "") -> Iterator[None]:
    """Turn python-tuf's refusals into Untrusted that says where, what and what to do.

    Its own text is kept where it is right; of a rollback found in a snapshot it has the numbers swapped.
    """
    try:
        yield
    except BadVersionNumberError as error:
        raise Untrusted(
            f"{where}: refused as a rollback: expected versions this node has seen or newer, got older",
            "fetch newer metadata; who owns the key can admit an old bundle again with `skerry bundle import`",
        ) from error
    except ExpiredMetadataError as error:
        raise Expired(
            f"{where}: refused: {error}",
            "check this node's clock, or get metadata that was signed lately; what serves goes on serving",
        ) from error
    except UnsignedMetadataError as error:
        raise Unsigned(
            f"{where}: expected a signature that this node's root accepts, got none ({error})", hint
        ) from error
    except RepositoryError as error:
        raise Untrusted(f"{where}: not valid: {error}", hint) from error
