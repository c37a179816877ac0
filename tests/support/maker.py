"""Somebody who makes models and signs their files, as OpenSSF Model Signing has it, well or badly."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import timedelta

import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from store_world import NOON

HASHES = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384(), "secp521r1": hashes.SHA512()}
DIGESTS = {"sha256": hashlib.sha256, "blake2b": hashlib.blake2b, "blake3": blake3.blake3}
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def pem_of(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def statement(files, *, algorithm="sha256", shard=None, **form):
    """What is signed about `files`, name -> bytes."""
    pieces = []
    for name, data in sorted(files.items()):
        for start in range(0, len(data), shard) if shard else [0]:
            part = data[start : start + shard] if shard else data
            label = f"{name}:{start}:{start + len(part)}" if shard else name
            digest = DIGESTS[algorithm](part).hexdigest()
            pieces.append({"name": label, "digest": digest, "algorithm": algorithm})
    form = {"method": "shards" if shard else "files", "hash_type": algorithm, "allow_symlinks": False} | form
    root = hashlib.sha256(b"".join(bytes.fromhex(piece["digest"]) for piece in pieces)).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "resources": pieces,
            "serialization": form | ({"shard_size": shard} if shard else {}),
        },
    }


def base64_of(data):
    return base64.b64encode(data).decode()


class Maker:
    """A key, and a certificate of it from an authority by way of a second one."""

    def __init__(
        self,
        curve=None,
        *,
        name="Example, Inc.",
        between_certifies=True,
        begins=NOON - timedelta(days=1),
        days=30,
        usage=None,
        **basic,
    ):
        self.key = ec.generate_private_key(curve or ec.SECP256R1())
        self.pem = pem_of(self.key)
        self.authority_key = ec.generate_private_key(ec.SECP256R1())
        between_key = ec.generate_private_key(ec.SECP256R1())
        self.authority = _certificate("root", self.authority_key, "root", self.authority_key, ca=True)
        between = _certificate("between", between_key, "root", self.authority_key, ca=between_certifies)
        leaf = _certificate(
            name, self.key, "between", between_key, begins=begins, days=days, usage=usage, **basic
        )
        self.chain = [leaf, between]
        self.authority_pem = self.authority.public_bytes(serialization.Encoding.PEM)

    def material(self, *, certified=False):
        if not certified:
            return {"publicKey": {"hint": hashlib.sha256(self.pem).hexdigest()}, "tlogEntries": []}
        certificates = [
            {"rawBytes": base64_of(each.public_bytes(serialization.Encoding.DER))} for each in self.chain
        ]
        return {"x509CertificateChain": {"certificates": certificates}}

    def document(self, said, *, certified=False):
        """A bundle about a statement (a dict, or the payload's bytes), as a dict to meddle with."""
        payload = said if isinstance(said, bytes) else json.dumps(said).encode()
        kind = "application/vnd.in-toto+json"
        encoded = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
        signature = self.key.sign(encoded, ec.ECDSA(HASHES[self.key.curve.name]))
        return {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": self.material(certified=certified),
            "dsseEnvelope": {
                "payload": base64_of(payload),
                "payloadType": kind,
                "signatures": [{"sig": base64_of(signature)}],
            },
        }

    def sign(self, files, *, certified=False, **options):
        """The bytes of a bundle about `files`."""
        return json.dumps(self.document(statement(files, **options), certified=certified)).encode()


def _certificate(
    name, key, issuer, issuer_key, *, ca=False, begins=None, days=3650, usage=None, signs=True, extra=None
):
    begins = begins or NOON - timedelta(days=10)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(_key_usage(signs=signs and not ca, certifies=ca), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if not ca:
        purpose = usage or x509.ExtendedKeyUsageOID.CODE_SIGNING
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if extra is not None:
        builder = builder.add_extension(extra, critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(text):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _key_usage(*, signs, certifies):
    return x509.KeyUsage(
        digital_signature=signs,
        key_cert_sign=certifies,
        crl_sign=certifies,
        content_commitment=not signs and not certifies,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
