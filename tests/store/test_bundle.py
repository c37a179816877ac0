from __future__ import annotations

import io
import os
import signal
import tarfile
from datetime import UTC, datetime, timedelta

import pytest
from store_world import Clock, DiskOs, full_disk, in_child, refusal_of, registry_at, tree

from skerry.errors import InvalidRequest, NotFound, StorageFailed, TooLarge, Untrusted
from skerry.manifest import Manifest
from store import bundle, carriers, durable, listing, tarball, trust, verify
from store.blobs import BlobStore, Content

ONE, TWO = b"first model" * 100, b"second model" * 100


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def world(tmp_path, clock):
    (tmp_path / "one.onnx").write_bytes(ONE)
    (tmp_path / "two.onnx").write_bytes(TWO)
    return tmp_path


@pytest.fixture
def owner(world, clock):
    registry = registry_at(world / "owner", clock)
    registry.add(world / "one.onnx", "digits", manifest=Manifest(labels={"a": "b"}))
    return registry


@pytest.fixture
def follower(world, clock, owner):
    registry = registry_at(world / "follower", clock)
    registry.init_follower(owner.root_bytes())
    return registry


@pytest.fixture
def first(world, owner):
    """A bundle of digits/1, revision 1."""
    bundle.export(owner, [("digits", None)], world / "first.tar")
    return world / "first.tar"


@pytest.fixture
def second(world, owner, first):
    """A bundle of faces/1, revision 2; digits/1 is named in it, and not carried."""
    owner.add(world / "two.onnx", "faces")
    bundle.export(owner, [("faces", None)], world / "second.tar")
    return world / "second.tar"


def have(registry):
    return [(e.name, e.version, e.installed) for e in registry.entries()]


def refuse(registry, path, match, error=Untrusted, **options):
    before = tree(registry.home)
    with pytest.raises(error, match=match) as refused:
        bundle.import_bundle(registry, path, **options)
    assert tree(registry.home) == before
    return refused.value


def members(path):
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}


def pack(path, files):
    """A tar by Python's own writer, so that ours is not its only reader's friend."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# -- export ------------------------------------------------------------------------------------------------


def test_a_bundle_is_an_ordinary_tar_of_the_chain_and_one_blob(owner, first):
    entry = owner.find("digits")
    blob = f"blobs/sha256/{entry.digest[7:9]}/{entry.digest[7:]}"
    found = members(first)
    assert list(found) == [
        "metadata/1.root.json",
        "metadata/1.snapshot.json",
        "metadata/1.targets.json",
        "metadata/1.models.json",
        "metadata/1.channels.json",
        "metadata/timestamp.json",
        blob,
    ]
    assert found[blob] == ONE


def test_equal_registries_give_equal_bundles(owner, first, world, clock):
    clock.advance(days=1)
    bundle.export(owner, [("digits", 1)], world / "again.tar")
    assert (world / "again.tar").read_bytes() == first.read_bytes()


def test_export_takes_the_newest_version_or_the_one_asked_for(owner, world):
    owner.add(world / "two.onnx", "digits")
    assert [e.version for e in bundle.export(owner, [("digits", None)], world / "b.tar")] == [2]
    assert TWO in members(world / "b.tar").values()
    assert [e.version for e in bundle.export(owner, [("digits", 1)], world / "b.tar")] == [1]
    assert ONE in members(world / "b.tar").values()
    with pytest.raises(NotFound):
        bundle.export(owner, [("digits", 3)], world / "b.tar")


def test_a_damaged_blob_is_not_exported(owner, world):
    entry = owner.find("digits")
    owner.blobs.path(entry.digest).chmod(0o600)
    owner.blobs.path(entry.digest).write_bytes(b"F" + ONE[1:])
    with pytest.raises(Untrusted, match=entry.digest):
        bundle.export(owner, [("digits", None)], world / "b.tar")
    owner.blobs.discard(entry.digest)
    with pytest.raises(NotFound):
        bundle.export(owner, [("digits", None)], world / "b.tar")
    assert not (world / "b.tar").exists()
    assert not list(world.glob(".tmp-*"))


def test_nothing_can_be_exported_from_an_empty_registry(world):
    with pytest.raises(NotFound):
        bundle.export(registry_at(world / "none"), [("digits", None)], world / "b.tar")


def test_progress_is_told_both_ways(owner, follower, world, monkeypatch):
    told = []
    bundle.export(owner, [("digits", None)], world / "b.tar", lambda done, total: told.append((done, total)))
    assert told == [(len(ONE), len(ONE))]
    monkeypatch.setattr(tarball, "CHUNK_BYTES", 1000)
    told.clear()
    bundle.import_bundle(follower, world / "b.tar", progress=lambda done, total: told.append((done, total)))
    assert told == [(1000, len(ONE)), (len(ONE), len(ONE))]


# -- import by a follower ----------------------------------------------------------------------------------


def test_a_follower_takes_what_its_root_signed(follower, owner, first, second):
    assert [e.name for e in bundle.import_bundle(follower, first)] == ["digits"]
    assert follower.entries() == [owner.find("digits")]
    assert [e.name for e in bundle.import_bundle(follower, second)] == ["faces"]
    assert have(follower) == [("digits", 1, True), ("faces", 1, True)]
    assert follower.listing().revision == 2
    for entry in follower.entries():
        follower.check(entry)


def test_what_a_bundle_names_and_does_not_carry_is_listed_as_not_installed(follower, second):
    bundle.import_bundle(follower, second)
    assert have(follower) == [("digits", 1, False), ("faces", 1, True)]


def test_a_node_without_a_root_is_told_to_pin_one(world, first):
    stranger = registry_at(world / "stranger")
    with pytest.raises(Untrusted, match="trusts nobody") as refused:
        bundle.import_bundle(stranger, first)
    assert "skerry trust init --root" in refused.value.hint
    assert stranger.listing() == listing.Listing(0, owner=False)


def test_a_bundle_of_another_owner_is_refused(world, follower, first, clock):
    bundle.import_bundle(follower, first)
    other = registry_at(world / "other", clock)
    other.add(world / "two.onnx", "digits")
    other.add(world / "one.onnx", "digits")
    bundle.export(other, [("digits", None)], world / "other.tar")
    refuse(follower, world / "other.tar", "expected a signature that this node's root accepts")
    refuse(follower, world / "other.tar", "expected a signature", resign=True)


def test_an_older_bundle_is_a_rollback(follower, first, second):
    bundle.import_bundle(follower, second)
    refuse(follower, first, "rollback")
    refuse(follower, first, "rollback", resign=True)  # a follower has nothing to sign with


@pytest.mark.parametrize("name", ["2.timestamp.json", "2.snapshot.json", "2.models.json"])
@pytest.mark.parametrize("harm", ["torn", "missing"])
def test_lost_metadata_lets_no_old_bundle_in_and_is_healed_by_the_same_one(
    follower, owner, first, second, name, harm
):
    for node in (follower, owner):
        bundle.import_bundle(node, second)
        path = node.metadata.folder / name
        path.write_bytes(b"") if harm == "torn" else path.unlink()
        with pytest.raises(Untrusted, match=name):
            node.listing()
        with pytest.raises(Untrusted):
            node.collect_garbage()
        refuse(node, first, "rollback")
        assert [e.name for e in bundle.import_bundle(node, second, resign=True)] == ["faces"]
        assert node.listing().revision == 2
    assert have(owner) == [("digits", 1, True), ("faces", 1, True)]


def test_an_expired_bundle_is_refused_and_what_was_there_serves_on(follower, first, second, clock):
    bundle.import_bundle(follower, first)
    clock.advance(days=400)
    refuse(follower, second, "expired")
    assert have(follower) == [("digits", 1, True)]


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_the_same_bundle_again_restores_blobs_even_when_expired(follower, first, clock, harm):
    (entry,) = bundle.import_bundle(follower, first)
    path = follower.blobs.path(entry.digest)
    path.chmod(0o600)
    path.write_bytes(b"F" + ONE[1:]) if harm == "damaged" else path.unlink()
    clock.advance(days=400)
    assert bundle.import_bundle(follower, first) == [entry]
    follower.check(entry)


def test_models_that_the_owner_removed_go_away(follower, owner, first, second, world):
    bundle.import_bundle(follower, first)
    owner.remove("digits")
    bundle.export(owner, [("faces", None)], world / "third.tar")
    bundle.import_bundle(follower, world / "third.tar")
    assert have(follower) == [("faces", 1, True)]
    assert len(list(follower.blobs.digests())) == 1


# -- import by the owner -----------------------------------------------------------------------------------


def test_the_owner_admits_an_old_bundle_only_by_saying_so(owner, first, second, world):
    owner.remove("digits")
    refuse(owner, first, "rollback")
    assert [e.name for e in bundle.import_bundle(owner, first, resign=True)] == ["digits"]
    assert have(owner) == [("digits", 1, True), ("faces", 1, True)]
    assert owner.find("digits").manifest.labels == {"a": "b"}
    assert owner.listing().revision == 4
    follower = registry_at(world / "f2", owner.clock)
    follower.init_follower(owner.root_bytes())
    bundle.export(owner, [("digits", None)], world / "again.tar")
    bundle.import_bundle(follower, world / "again.tar")
    assert have(follower) == [("digits", 1, True), ("faces", 1, False)]


def test_the_owner_loses_nothing_to_a_bundle_of_a_twin(owner, world, clock):
    twin = registry_at(world / "twin", clock, keys="../owner/keys")
    twin.init_follower(owner.root_bytes())
    for number in range(3):
        (world / "face.onnx").write_bytes(TWO[number:])
        twin.add(world / "face.onnx", "faces")
    bundle.export(twin, [("faces", None)], world / "twin.tar")
    bundle.import_bundle(owner, world / "twin.tar", resign=True)
    assert have(owner) == [("digits", 1, True), ("faces", 3, True)]
    assert owner.listing().revision == 4  # beyond the twin's 3


def test_the_owner_does_not_sign_again_what_is_there(owner, first):
    entry = owner.find("digits")
    owner.blobs.discard(entry.digest)
    before = owner.listing().revision
    assert bundle.import_bundle(owner, first, resign=True) == [entry]
    assert owner.listing().revision == before
    owner.check(entry)


def test_the_owner_never_changes_a_version_by_import(owner, first, world):
    owner.remove("digits")
    owner.add(world / "two.onnx", "digits")
    refuse(owner, first, "expected the file", InvalidRequest, resign=True)
    owner.remove("digits")
    owner.add(world / "two.onnx", "Digits")
    refuse(owner, first, "'Digits'", InvalidRequest, resign=True)


# -- hostile bundles ---------------------------------------------------------------------------------------


def blob_of(files):
    return next(name for name in files if name.startswith("blobs/"))


def test_a_tampered_blob_is_refused_with_both_digests(follower, first, world):
    files = members(first)
    name = blob_of(files)
    files[name] = b"F" + ONE[1:]
    refused = refuse(follower, pack(world / "bad.tar", files), "expected sha256:.*got sha256:")
    assert name.rsplit("/", 1)[1] in refused.message


def test_a_blob_of_another_length_is_refused(follower, first, world):
    files = members(first)
    name = blob_of(files)
    for wrong in (ONE[:-1], ONE + b"x", b""):
        with pytest.raises((Untrusted, InvalidRequest)):
            bundle.import_bundle(follower, pack(world / "bad.tar", files | {name: wrong}))
        assert have(follower) == []
        assert not [p for p in follower.blobs.root.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "1.models.json", "1.channels.json"]
)
def test_tampered_or_missing_metadata_is_refused(follower, first, world, name):
    files = members(first)
    changed = files[f"metadata/{name}"].replace(b"2027", b"2037")
    refuse(follower, pack(world / "bad.tar", files | {f"metadata/{name}": changed}), name)
    del files[f"metadata/{name}"]
    refuse(follower, pack(world / "bad.tar", files), name)


def test_a_blob_that_nothing_names_is_refused(follower, first, world):
    files = members(first) | {f"blobs/sha256/ab/ab{'0' * 62}": b"stowaway"}
    refuse(follower, pack(world / "bad.tar", files), "stowaway|only blobs that its signed metadata names")


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "metadata/../../evil",
        "metadata/0.root.json",
        "metadata/evil.json",
        "metadata/timestamp.json\n",
        "blobs/sha256/ab/" + "cd" * 32,
        "README",
        "",
    ],
)
def test_members_that_are_none_of_a_bundles_are_refused(follower, first, world, name):
    refuse(
        follower, pack(world / "bad.tar", members(first) | {name: b"x"}), "expected only a bundle's members"
    )
    assert not (world.parent / "evil").exists()


def test_a_member_that_comes_twice_is_refused(follower, first, world):
    files = members(first)
    with tarfile.open(pack(world / "bad.tar", files), "a", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("metadata/timestamp.json")
        archive.addfile(info, io.BytesIO())
    refuse(follower, world / "bad.tar", "each once")


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.CONTTYPE,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_SPARSE,
    ],
)
def test_links_devices_and_extensions_are_refused(follower, world, kind):
    info = tarfile.TarInfo("metadata/timestamp.json")
    info.type, info.linkname = kind, "/etc/passwd"
    (world / "bad.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + tarball.END)
    refuse(follower, world / "bad.tar", "expected a regular file")


@pytest.mark.parametrize("size", [trust.MAX_TIMESTAMP_BYTES + 1, 8**11 - 1])
def test_a_member_over_its_ceiling_is_refused_by_its_header(follower, world, size):
    (world / "bad.tar").write_bytes(tarball.header("metadata/timestamp.json", size))
    refuse(follower, world / "bad.tar", "expected at most 16384 bytes")


def test_a_negative_size_is_refused(follower, world):
    info = tarfile.TarInfo("metadata/timestamp.json")
    info.size = -1024
    (world / "bad.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    refuse(follower, world / "bad.tar", "expected at most")


def test_too_many_members_are_refused(follower, first, monkeypatch):
    monkeypatch.setattr(tarball, "MAX_MEMBERS", 3)
    refuse(follower, first, "at most 3 members")


@pytest.mark.parametrize("keep", [0, 100, 512, 700, -1024, -2048])
def test_a_bundle_that_is_cut_off_is_refused(follower, first, world, keep):
    (world / "bad.tar").write_bytes(first.read_bytes()[:keep])
    refuse(follower, world / "bad.tar", "bad.tar")


@pytest.mark.parametrize("junk", [b"x" * 2048, b"PK\x03\x04" + bytes(600), b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_is_refused(follower, world, junk):
    (world / "bad.tar").write_bytes(junk)
    refuse(follower, world / "bad.tar", "tar header")


def test_a_bundle_that_is_not_there_or_not_a_file(follower, world):
    refuse(follower, world / "none.tar", "no such file", NotFound)
    os.mkfifo(world / "pipe.tar")
    refuse(follower, world / "pipe.tar", "regular file", StorageFailed)


def test_a_bundle_that_shrinks_while_it_is_read(follower, first):
    with tarball.Reader(first, carriers._ceiling) as reader:
        os.truncate(first, 600)
        with pytest.raises(Untrusted, match="cut off"):
            reader.read("metadata/timestamp.json")
        assert reader.read("metadata/none.json") is None


# -- the disk, and the child -------------------------------------------------------------------------------


def test_a_full_disk_during_import_leaves_the_old_state(follower, first, second, monkeypatch):
    bundle.import_bundle(follower, first)
    refusals = 0
    for step in range(100):
        monkeypatch.setattr(durable, "os", full_disk(step, stays_full=True))
        refused = refusal_of(lambda: bundle.import_bundle(follower, second))
        if refused is None:
            break
        refusals += 1
        assert "No space left" in refused.message
        assert have(follower) == [("digits", 1, True)]
        assert len(list(follower.blobs.digests())) == 1
        assert not [path for path in follower.home.rglob(".*") if path.name != ".lock"]
    assert refusals > 15
    assert have(follower) == [("digits", 1, True), ("faces", 1, True)]


LARGE = bytes(range(256)) * 12 * 1024  # three of the pieces in which a bundle is read


@pytest.fixture
def heavy(world, owner, monkeypatch):
    """A bundle of heavy/1 and light/1, and a count of the bytes that are written to the disk."""
    (world / "heavy.onnx").write_bytes(LARGE)
    owner.add(world / "heavy.onnx", "heavy")
    owner.add(world / "two.onnx", "light")
    bundle.export(owner, [("heavy", None), ("light", None)], world / "heavy.tar")
    return world / "heavy.tar"


def die_in_the_middle_of_the_large_one():
    seen = []

    def meddle(name, _number, call):
        if name == "write":
            seen.append(1)
            if len(seen) > 3:
                os.kill(os.getpid(), signal.SIGKILL)
        return call()

    return DiskOs(meddle)


def import_and_count(follower, path, monkeypatch):
    """The bytes of blobs that were written."""
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    bundle.import_bundle(follower, path)
    monkeypatch.setattr(durable, "os", os)
    return sum(len(args[1]) for name, args in disk.steps if name == "write" and len(args[1]) > 10_000)


def parts(follower):
    return [path.stat().st_size for path in follower.blobs.root.glob(".part-*")]


def kill_in_the_middle(follower, path, monkeypatch):
    monkeypatch.setattr(durable, "os", die_in_the_middle_of_the_large_one())
    assert not in_child(lambda: bundle.import_bundle(follower, path))
    monkeypatch.setattr(durable, "os", os)


def test_an_import_that_was_killed_goes_on_where_it_stopped(follower, heavy, monkeypatch):
    kill_in_the_middle(follower, heavy, monkeypatch)
    (kept,) = parts(follower)
    assert 0 < kept < len(LARGE)
    follower.init_follower(follower.root_bytes())  # another change meanwhile leaves it alone
    assert parts(follower) == [kept]
    assert import_and_count(follower, heavy, monkeypatch) == len(LARGE) - kept
    assert have(follower) == [("digits", 1, False), ("heavy", 1, True), ("light", 1, True)]
    for name in ("heavy", "light"):
        follower.check(follower.find(name))
    assert parts(follower) == []
    assert not (follower.home / "incoming.json").exists()


def test_a_part_that_a_power_cut_tore_is_begun_anew(follower, heavy, monkeypatch):
    kill_in_the_middle(follower, heavy, monkeypatch)
    (part,) = follower.blobs.root.glob(".part-*")
    part.write_bytes(bytes(part.stat().st_size))
    assert import_and_count(follower, heavy, monkeypatch) >= len(LARGE)
    follower.check(follower.find("heavy"))


def test_parts_that_nobody_comes_back_for_are_removed(follower, heavy, clock, monkeypatch):
    kill_in_the_middle(follower, heavy, monkeypatch)
    clock.time = datetime.now(UTC) + timedelta(days=8)
    follower.collect_garbage()
    assert parts(follower) == []
    assert not (follower.home / "incoming.json").exists()


def test_an_import_that_is_refused_keeps_no_parts(follower, heavy, world, monkeypatch):
    kill_in_the_middle(follower, heavy, monkeypatch)
    files = members(heavy)
    name = max((name for name in files if name.startswith("blobs/")), key=lambda name: len(files[name]))
    files[name] = files[name][:-1] + b"F"
    with pytest.raises(Untrusted, match="expected sha256"):
        bundle.import_bundle(follower, pack(world / "bad.tar", files))
    assert parts(follower) == []
    assert have(follower) == []


def test_what_was_taken_in_whole_is_not_written_again(follower, heavy, monkeypatch):
    bundle.import_bundle(follower, heavy)
    assert import_and_count(follower, heavy, monkeypatch) == 0


def test_a_body_without_end_is_cut_at_what_was_signed(follower, owner, first):
    entry = owner.find("digits")
    told = []

    def endless(offset):
        assert offset == 0
        while True:
            told.append(1)
            yield b"x" * 1000

    with pytest.raises(TooLarge, match=f"expected at most {len(ONE)} bytes"):
        follower.blobs.resume(Content(entry.digest, entry.size_bytes), endless)
    assert len(told) == 2
    assert not [path for path in follower.blobs.root.rglob("*") if path.is_file()]


def test_a_full_disk_during_export_leaves_the_old_file(owner, world, monkeypatch):
    (world / "b.tar").write_bytes(b"old")
    monkeypatch.setattr(durable, "os", full_disk(3, stays_full=True))
    with pytest.raises(StorageFailed):
        bundle.export(owner, [("digits", None)], world / "b.tar")
    assert (world / "b.tar").read_bytes() == b"old"
    assert not list(world.glob(".tmp-*"))


def test_the_child_imports_what_is_newer_and_never_what_is_older(world, capfdbinary):
    owner = registry_at(world / "owner2")
    owner.add(world / "one.onnx", "digits")
    bundle.export(owner, [("digits", None)], world / "old.tar")
    owner.add(world / "two.onnx", "faces")
    node = registry_at(world / "node")
    node.init_follower(owner.root_bytes())
    bundle.export(owner, [("faces", None)], world / "new.tar")
    arguments = [*map(str, node.places), "--import"]
    assert verify.main([*arguments, str(world / "new.tar")]) == 0
    found = listing.parse(capfdbinary.readouterr().out)
    assert [(e.name, e.installed) for e in found.entries] == [("digits", False), ("faces", True)]
    assert verify.main([*arguments, str(world / "old.tar")]) == 1
    with pytest.raises(Untrusted, match="rollback"):
        listing.parse(capfdbinary.readouterr().out)
    assert verify.main([*map(str, owner.places), "--import", str(world / "old.tar")]) == 1
    assert BlobStore(node.home / "blobs").has(owner.find("faces").digest, len(TWO))


def test_refusal_of_a_file_whose_name_is_not_utf8_reaches_the_daemon():
    document = listing.refusal(Untrusted("\udcff.tar: not signed"))
    with pytest.raises(Untrusted, match="not signed"):
        listing.parse(listing.encode(document))
