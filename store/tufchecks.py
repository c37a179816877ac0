"""python-tuf's checks, and its refusals in our words.

Does: start a set of checks from a root chain; translate what it raises.
Leaves out: the order of checks, files, clocks (store.trust).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)

from skerry.errors import Untrusted
from store.tuflight import EnvelopeType, TrustedMetadataSet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Unsigned(Untrusted):
    """The signatures do not satisfy the root at hand; another root of the chain may do."""


class SameVersion(Untrusted):
    """The offered timestamp has the version of the installed one."""


def start(roots: Sequence[bytes], where: str, hint: str = "") -> TrustedMetadataSet:
    """Checks that trust `roots[0]` by itself and each further root by the one before.

    Raises:
        Untrusted: one of them does not hold.
    """
    with refusing(f"{where}: root 1 of {len(roots)}", hint):
        checks = TrustedMetadataSet(roots[0], EnvelopeType.METADATA)
    _require_consistent(checks, where)
    for number, data in enumerate(roots[1:], 2):
        extend(checks, data, f"{where}: root {number} of {len(roots)}", hint)
    return checks


def extend(checks: TrustedMetadataSet, root: bytes, where: str, hint: str = "") -> None:
    """Go on to the next root.

    Raises:
        Untrusted: it is not signed by the one before and by itself, or not the next one.
    """
    with refusing(where, hint):
        checks.update_root(root)
    _require_consistent(checks, where)


def _require_consistent(checks: TrustedMetadataSet, where: str) -> None:
    # Without it files keep their names from version to version, and no rename could commit them together.
    if not checks.root.consistent_snapshot:
        raise Untrusted(f"{where}: expected consistent_snapshot true, got false")


@contextmanager
def refusing(where: str, hint: str = "") -> Iterator[None]:
    """Turn python-tuf's refusals into Untrusted that says where, what and what to do.

    Its own text is kept where it is right; of a rollback found in a snapshot it has the numbers swapped.
    """
    try:
        yield
    except EqualVersionNumberError as error:
        raise SameVersion(f"{where}: this version is installed already, with other bytes") from error
    except BadVersionNumberError as error:
        raise Untrusted(
            f"{where}: refused as a rollback: expected versions this node has seen or newer, got older",
            "fetch newer metadata; who owns the key can admit an old bundle again with `skerry model import`",
        ) from error
    except ExpiredMetadataError as error:
        raise Untrusted(
            f"{where}: refused: {error}",
            "check this node's clock, or get metadata that was signed lately; what serves goes on serving",
        ) from error
    except UnsignedMetadataError as error:
        raise Unsigned(
            f"{where}: expected a signature that this node's root accepts, got none ({error})", hint
        ) from error
    except RepositoryError as error:
        raise Untrusted(f"{where}: not valid: {error}", hint) from error
