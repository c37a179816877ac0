"""`--provenance`: check who made a model before it is signed for this registry, and say it.

Does: the three options, the check in the order that fails early, one line about the outcome.
Leaves out: signatures and files themselves (store.provenance), which bring `cryptography`: imported inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skerry.errors import InvalidRequest

if TYPE_CHECKING:
    from store.provenance import Verified

BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--provenance",
        exists=True,
        dir_okay=False,
        help="The maker's signature on the model's files: an OpenSSF Model Signing bundle.",
        show_default=False,
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--provenance-key",
        exists=True,
        dir_okay=False,
        help="The maker's public key, PEM.",
        show_default=False,
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--provenance-ca",
        exists=True,
        dir_okay=False,
        help="Or who certifies the maker: CA certificates, PEM.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Claim:
    """A bundle and the file that says whose signature it must have: a public key, or CA certificates."""

    bundle: Path
    anchor: Path
    is_ca: bool

    def verify(self, model: Path) -> Verified:
        """Check the signature; of a directory, all its files as well.

        Raises:
            InvalidRequest, Unsupported: the bundle or the anchor is none that can be checked here.
            Untrusted: the signature does not hold, or a file in the directory is not as signed.
        """
        from store import provenance  # noqa: PLC0415 - brings cryptography

        anchor = provenance.read_anchor(self.anchor, is_ca=self.is_ca)
        verified = provenance.verify(provenance.read(self.bundle), str(self.bundle), anchor)
        if model.is_dir():
            verified.directory(model, self.bundle)
        return verified


def claim(bundle: Path | None, key: Path | None, ca: Path | None) -> Claim | None:
    """What the options ask for; None where they say nothing.

    Raises:
        InvalidRequest: they do not go together.
    """
    anchor = key or ca
    if (bundle is None) != (anchor is None) or (key and ca):
        raise InvalidRequest(
            "--provenance: expected a bundle and one of --provenance-key and --provenance-ca, got others",
            "a signature proves something only with the key or the authority that it is compared with",
        )
    return Claim(bundle, anchor, is_ca=key is None) if bundle and anchor else None


def signed_path(model: Path, root: Path) -> PurePosixPath:
    """The name of a model's file in what was signed: below `root` if that is its directory, else its own."""
    return PurePosixPath(model.relative_to(root) if root.is_dir() else model.name)


def summary(record: dict[str, Any]) -> str:
    """A provenance record in one line."""
    files = "1 file" if record["files"] == 1 else f"{record['files']} files"
    return f"{record['method']} {record['signer']}, {files}, bundle {record['bundle']}"
