"""Keys from files, from a token that is real, and from places whose packages are not here."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from people import Office, fetched, holders, memory_folder, nobody
from securesystemslib.exceptions import UnverifiedSignatureError

from skerry.errors import ConfigError, Denied, InvalidRequest, NotFound, StorageFailed, Unsupported
from store import keyfiles, offices, stock
from store.keyring import Keyring, identify
from store.publishing import publish
from store.repository import Plan, Repository

SOFTHSM = next(
    (
        path
        for path in map(Path, ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so"))
        if path.exists()
    ),
    None,
)
PIN, LABEL = "1234", "skerry-test"


def pem(key, *, password=None):
    protection = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def written(path, data, mode=0o600):
    path.write_bytes(data)
    path.chmod(mode)
    return path


# -- files ------------------------------------------------------------------------------------------------


def test_a_new_key_is_secret_from_its_first_byte_and_its_public_half_is_not(tmp_path):
    keyfiles.make(tmp_path / "keys" / "ann.pem")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "keys/ann.pem").stat().st_mode) == 0o600
    assert b"PUBLIC KEY" in (tmp_path / "keys/ann.pem.pub").read_bytes()
    with pytest.raises(InvalidRequest, match="expected a name that is free"):
        keyfiles.make(tmp_path / "keys" / "ann.pem")


def test_the_public_half_has_the_same_id_in_every_form(tmp_path):
    signer = keyfiles.make(tmp_path / "ann.pem")
    other = keyfiles.make(tmp_path / "bob.pem")
    (tmp_path / "ann.json").write_bytes(keyfiles.public_json(signer.public_key))
    for name in ("ann.pem", "ann.pem.pub", "ann.json"):
        found = identify(str(tmp_path / name), nobody)
        assert found.key == signer.public_key
        assert found.label == "ann"
    assert other.public_key.keyid != signer.public_key.keyid


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_files_of_both_kinds_sign(tmp_path, kind):
    if kind == "p256":
        written(tmp_path / "a.pem", pem(ec.generate_private_key(ec.SECP256R1())))
    else:
        keyfiles.make(tmp_path / "a.pem")
    keyring = Keyring(None, nobody)
    named = keyring.give(str(tmp_path / "a.pem"))
    signature = keyring.signer(named.key.keyid).sign(b"words")
    named.key.verify_signature(signature, b"words")
    with pytest.raises(UnverifiedSignatureError):
        named.key.verify_signature(signature, b"other words")


def test_a_key_that_others_can_read_is_refused_and_says_what_to_do(tmp_path):
    keyfiles.make(tmp_path / "a.pem")
    (tmp_path / "a.pem").chmod(0o640)
    with pytest.raises(Denied, match="expected mode 0600, got 0640") as caught:
        identify(str(tmp_path / "a.pem"), nobody)
    assert caught.value.hint == f"others can read this key: chmod 600 {tmp_path}/a.pem"


@pytest.mark.parametrize(
    "data",
    [
        pem(ec.generate_private_key(ec.SECP384R1())),
        pem(rsa.generate_private_key(65537, 2048)),
        pem(ec.generate_private_key(ec.SECP256R1()), password=b"secret"),
        b"-----BEGIN PRIVATE KEY-----\nno\n-----END PRIVATE KEY-----\n",
    ],
    ids=["P-384", "RSA", "password", "garbage"],
)
def test_private_keys_of_other_kinds_are_refused(tmp_path, data):
    with pytest.raises(InvalidRequest, match=r"expected an Ed25519 or ECDSA P-256 private key"):
        identify(str(written(tmp_path / "a.pem", data)), nobody)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"keytype": 1}', b"-----BEGIN PUBLIC KEY-----\n", b"\xff\xfe"]
)
def test_what_is_no_public_key_is_refused(tmp_path, data):
    with pytest.raises(InvalidRequest, match="expected a public key as PEM or JSON"):
        identify(str(written(tmp_path / "a.pub", data)), nobody)


def test_a_public_key_cannot_claim_the_id_of_another(tmp_path):
    mine, other = keyfiles.make(tmp_path / "a.pem"), keyfiles.make(tmp_path / "b.pem")
    claim = json.loads(keyfiles.public_json(mine.public_key)) | {"keyid": other.public_key.keyid}
    (tmp_path / "claim.json").write_text(json.dumps(claim))
    with pytest.raises(InvalidRequest, match=f"expected the key id {mine.public_key.keyid}"):
        identify(str(tmp_path / "claim.json"), nobody)


@pytest.mark.parametrize("text", ["nowhere.pem", "file:nowhere.pem", "file:/nowhere/a.pem"])
def test_a_file_that_is_not_there_is_named(text):
    with pytest.raises(NotFound, match="expected a key file, found none"):
        identify(text, nobody)


def test_an_unknown_scheme_is_told_which_there_are():
    with pytest.raises(InvalidRequest, match=r"begins with awskms, azurekms, file, gcpkms, hsm, hv"):
        identify("gnupg:ABCD", nobody)


@pytest.mark.parametrize(
    ("uri", "extra"),
    [
        ("awskms:1234", "awskms"),
        ("azurekms://vault.vault.azure.net/keys/name/1", "azurekms"),
        ("gcpkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1", "gcpkms"),
        ("hv:name/1", "vault"),
        ("tkey:", "tkey"),
    ],
)
def test_a_missing_package_is_named_with_how_to_get_it(uri, extra):
    with pytest.raises(Unsupported, match="expected the packages for") as caught:
        identify(uri, nobody)
    assert caught.value.hint == f"pip install 'securesystemslib[{extra}]'"


# -- keys.json --------------------------------------------------------------------------------------------


def test_remembered_files_move_with_the_repository_and_secrets_are_not_written(tmp_path):
    folder = tmp_path / "repo"
    signer = keyfiles.make(folder / "keys/ann.pem")
    keyring = Keyring(folder, nobody)
    keyring.remember(keyring.give(str(folder / "keys/ann.pem")))
    keyring.remember(keyring.give(str(folder / "keys/ann.pem.pub")))  # forgets nothing
    text = (folder / "keys.json").read_text()
    assert '"file:keys/ann.pem"' in text
    assert "PRIVATE" not in text
    shutil.move(folder, tmp_path / "moved")
    assert Keyring(tmp_path / "moved", nobody).signer(signer.public_key.keyid) is not None


def test_a_remembered_key_that_is_not_here_is_no_error_and_one_that_was_given_is(tmp_path):
    signer = keyfiles.make(tmp_path / "ann.pem")
    keyring = Keyring(tmp_path / "repo", nobody)
    keyring.remember(keyring.give(str(tmp_path / "ann.pem")))
    (tmp_path / "ann.pem").unlink()
    later = Keyring(tmp_path / "repo", nobody)
    assert later.signer(signer.public_key.keyid) is None
    assert "expected a key file, found none" in later.absent[signer.public_key.keyid]
    with pytest.raises(NotFound):
        keyring.signer(signer.public_key.keyid)


def test_a_key_file_that_was_replaced_signs_nothing(tmp_path):
    keyfiles.make(tmp_path / "ann.pem")
    keyring = Keyring(tmp_path / "repo", nobody)
    named = keyring.give(str(tmp_path / "ann.pem"))
    keyring.remember(named)
    for name in ("ann.pem", "ann.pem.pub"):
        (tmp_path / name).unlink()
    keyfiles.make(tmp_path / "ann.pem")
    with pytest.raises(InvalidRequest, match=f"expected the key {named.key.keyid[:12]}"):
        Keyring(tmp_path / "repo", nobody).signer(named.key.keyid)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"keys": {"a": {"public": {}}}}'])
def test_a_torn_list_of_keys_says_what_to_do(tmp_path, data):
    (tmp_path / "keys.json").write_bytes(data)
    with pytest.raises(StorageFailed, match="expected the repository's list of keys") as caught:
        Keyring(tmp_path, nobody)
    assert "--key" in caught.value.hint


# -- a token ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """A SoftHSM2 token with one P-256 key under number 2, as a YubiKey's signing slot has it."""
    pkcs11 = pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    if SOFTHSM is None or shutil.which("softhsm2-util") is None:
        pytest.skip("softhsm2 is not installed")
    place = tmp_path_factory.mktemp("softhsm")
    (place / "tokens").mkdir()
    (place / "softhsm2.conf").write_text(f"directories.tokendir = {place}/tokens\nlog.level = ERROR\n")
    saved = {name: os.environ.get(name) for name in ("SOFTHSM2_CONF", "PYKCS11LIB")}
    os.environ["SOFTHSM2_CONF"], os.environ["PYKCS11LIB"] = str(place / "softhsm2.conf"), str(SOFTHSM)
    command = ["softhsm2-util", "--init-token", "--free", "--label", LABEL, "--pin", PIN, "--so-pin", "5678"]
    subprocess.run(command, check=True, capture_output=True)
    library = pkcs11.lib(str(SOFTHSM))
    with library.get_token(token_label=LABEL).open(user_pin=PIN, rw=True) as session:
        curve = pkcs11.util.ec.encode_named_curve_parameters("secp256r1")
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: curve}, local=True
        )
        parameters.generate_keypair(
            id=b"\x02",
            label="signing",
            store=True,
            mechanism_param=None,
            capabilities=pkcs11.MechanismFlag.SIGN | pkcs11.MechanismFlag.VERIFY,
        )
    yield f"hsm:2?label={LABEL}"
    for name, value in saved.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_a_token_signs_for_a_whole_repository_and_another_client_believes_it(token):
    with memory_folder() as place:
        asked = []

        def pin(secret):
            asked.append(secret)
            return PIN

        def open_():
            return Repository(place / "repo", pin)

        repository = open_()
        named = repository.keyring.give(token)
        assert (named.key.keytype, named.key.scheme) == ("ecdsa", "ecdsa-sha2-nistp256")
        repository.keyring.remember(named)
        office = Office(place)
        mine = office.ann
        all_ = holders(mine)
        from store.roles import Holders

        both = Holders((named.key, mine.key), 2)
        repository.keyring.give(str(mine.file))
        repository.keyring.remember(mine.named)
        assert not repository.init(Plan(both, both, all_, Holders((named.key,)), all_)).waiting
        assert asked == ["pin"]  # once a command
        stock.add(open_(), office.model("by token"), "det")
        offices.rotate(open_(), "channels", [named.key], [mine.id])
        publish(open_(), place / "public")
        root = place / "repo/metadata/1.root.json"
        found = fetched(place / "public", place / "cache", root, "models/det/1.onnx")
        assert found == {"models/det/1.onnx": "by token"}


def test_a_wrong_pin_ends_the_command_after_one_try_and_changes_nothing(token):
    with memory_folder() as place:
        tries = []
        repository = Repository(place / "repo", lambda _: tries.append(1) or "9999")
        named = repository.keyring.give(token)
        repository.keyring.remember(named)
        from store.roles import Holders

        mine = Holders((named.key,))
        with pytest.raises(Denied, match="the PIN is wrong") as caught:
            repository.init(Plan(mine, mine, mine, mine, mine))
        assert "SKERRY_HSM_PIN" in caught.value.hint
        assert tries == [1]
        assert not repository.exists()


def test_tokens_and_keys_that_are_not_there_are_told_before_a_pin_is_asked_for(token, monkeypatch):
    with pytest.raises(NotFound, match="No PKCS#11 token found for label other"):
        identify("hsm:2?label=other", nobody)
    with pytest.raises(InvalidRequest, match=r"expected hsm:\[NUMBER\]"):
        identify("hsm:two", nobody)
    monkeypatch.delenv("PYKCS11LIB")
    with pytest.raises(
        ConfigError, match="expected PYKCS11LIB to name the token's PKCS#11 library"
    ) as caught:
        identify(token, nobody)
    assert "export PYKCS11LIB=" in caught.value.hint
    monkeypatch.setenv("PYKCS11LIB", "/nowhere.so")
    with pytest.raises(ConfigError, match=r"/nowhere\.so: cannot be used"):
        identify(token, nobody)


def test_a_number_without_a_key_is_told(token):
    with pytest.raises(InvalidRequest, match="could not find ECDSA key"):
        identify(f"hsm:7?label={LABEL}", lambda _: PIN)


def test_a_token_in_a_drawer_is_no_error(token):
    with memory_folder() as place:
        keyring = Keyring(place, nobody)
        named = keyring.give(token)
        keyring.remember(named)
        text = (place / "keys.json").read_text().replace(LABEL, "drawer")
        (place / "keys.json").write_text(text)
        later = Keyring(place, nobody)
        assert later.signer(named.key.keyid) is None
        assert "No PKCS#11 token found" in later.absent[named.key.keyid]
