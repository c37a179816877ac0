"""Models with files beside them, in the registry and in bundles."""

import os
from dataclasses import replace

import msgspec
import pytest
from people import Office, fetched, holders, memory_folder
from securesystemslib.signer import CryptoSigner
from store_world import NOON, Clock, registry_at, tree
from tuf.api.metadata import DelegatedRole, Delegations, TargetFile, Targets
from untrusted import chain_of

from skerry.errors import InvalidRequest, NotFound, StorageFailed, TooLarge, Untrusted
from skerry.manifest import Manifest
from store import bundle, listing, offices, registry, roles, sidefiles, signing, stock, targets, teams
from store.blobs import MISSING, TAMPERED, BlobStore, seal_beside, seal_file
from store.publishing import publish
from store.registry import signed_models

MODEL, OTHER = b"a model" * 100, b"another model" * 100
A, B, C = b"first values" * 100, b"second values" * 100, b"third values" * 100


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def file(tmp_path):
    """file(bytes) -> a path that holds them."""

    def write(data, name="file"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def node(tmp_path, clock):
    return registry_at(tmp_path / "node", clock)


@pytest.fixture
def add(node, file):
    """add("det", 1, MODEL, **{"a.bin": A}) signs it."""

    def add(name, version, model, at=node, **files):
        paths = {beside: file(data, f"beside-{beside}") for beside, data in files.items()}
        return at.add(file(model), name, version, files=paths)

    return add


@pytest.fixture
def follower(tmp_path, clock, node, add):
    add("first", 1, b"so that there is a root")
    follower = registry_at(tmp_path / "follower", clock)
    follower.init_follower(node.root_bytes())
    return follower


def stored(node):
    return sorted(node.blobs.path(digest).read_bytes() for digest in node.blobs.digests())


def have(node):
    return {(e.name, e.version): (e.installed, [file.name for file in e.files]) for e in node.entries()}


# -- signing and reading -----------------------------------------------------------------------------------


def test_every_file_is_a_signed_target_of_its_own(node, add):
    entry = add("det", 3, MODEL, **{"b.bin": B, "a.bin": A})
    signed = signed_models(node.trusted())
    assert sorted(signed) == ["models/det/3.onnx", "models/det/3/a.bin", "models/det/3/b.bin"]
    assert [file.name for file in entry.files] == ["a.bin", "b.bin"]
    assert signed["models/det/3.onnx"].custom["files"] == {file.name: file.digest for file in entry.files}
    for found in entry.files:
        target = signed[f"models/det/3/{found.name}"]
        assert (f"sha256:{target.hashes['sha256']}", target.length) == (found.digest, found.size_bytes)
    assert entry.total_bytes == len(MODEL) + len(A) + len(B)
    assert node.listing().entries == (entry,)
    assert node.listing().problems == ()
    assert stored(node) == sorted([MODEL, A, B])
    node.check(entry)


def test_the_listing_says_them_to_the_daemon(node, add):
    entry = add("det", 1, MODEL, **{"a.bin": A})
    assert listing.parse(listing.encode(node.listing())).entries == (entry,)


def test_a_version_never_changes_its_files(node, add):
    add("det", 1, MODEL, **{"a.bin": A})
    before = tree(node.metadata.folder)
    for files in ({"a.bin": B}, {"b.bin": A}, {}, {"a.bin": A, "b.bin": B}):
        with pytest.raises(InvalidRequest, match="exists: expected the side files"):
            add("det", 1, MODEL, **files)
        assert tree(node.metadata.folder) == before
    assert stored(node) == sorted([MODEL, A])


def test_adding_the_same_again_repairs_a_file(node, add):
    entry = add("det", 1, MODEL, **{"a.bin": A})
    damage(node, entry.files[0])
    with pytest.raises(Untrusted):
        node.check(entry)
    assert add("det", 1, MODEL, **{"a.bin": A}) == entry
    node.check(entry)


def damage(node, found, data=None):
    path = node.blobs.path(found.digest)
    data = path.read_bytes() if data is None else data
    path.chmod(0o600)
    path.write_bytes(b"X" + data[1:])


def test_a_changed_file_is_refused_with_both_digests(node, add):
    entry = add("det", 1, MODEL, **{"a.bin": A, "b.bin": B})
    damage(node, entry.files[1])
    with pytest.raises(Untrusted) as refused:
        node.check(entry)
    assert f"expected {entry.files[1].digest}" in refused.value.message
    assert refused.value.message.count("sha256:") == 2


def test_a_model_is_installed_only_with_all_its_files(node, add):
    entry = add("det", 1, MODEL, **{"a.bin": A, "b.bin": B})
    node.blobs.discard(entry.files[0].digest)
    (found,) = node.entries()
    assert not found.installed
    with pytest.raises(NotFound):
        node.check(found)


def test_two_models_may_have_files_of_one_name(node, add):
    one = add("det", 1, MODEL, **{"weights.bin": A})
    two = add("cls", 1, MODEL, **{"weights.bin": B})
    three = add("det", 2, OTHER, **{"weights.bin": A})
    assert node.listing().problems == ()
    assert one.digest == two.digest
    assert len({one.content_digest, two.content_digest, three.content_digest}) == 3
    assert [entry.files[0].digest == one.files[0].digest for entry in (two, three)] == [False, True]
    for entry in node.entries():
        node.check(entry)


def test_a_model_without_files_has_the_digest_of_its_bytes(node, add):
    entry = add("det", 1, MODEL)
    assert (entry.content_digest, entry.total_bytes, entry.files) == (entry.digest, len(MODEL), ())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a.bin", "a/b.bin", "/a.bin", ".a", "a b", "ä", "a" * 129]
)
def test_names_that_are_no_plain_ones_are_not_signed(node, file, name):
    with pytest.raises(InvalidRequest, match="side file: expected a plain name"):
        node.add(file(MODEL), "det", files={name: file(A, "a")})
    assert node.entries() == []
    assert stored(node) == []


def test_names_that_differ_in_case_only_are_not_signed(node, add):
    with pytest.raises(InvalidRequest, match="differs in case only"):
        add("det", 1, MODEL, **{"a.bin": A, "A.bin": B})
    assert node.entries() == []


def test_the_number_and_the_size_of_files_have_ceilings(node, add, monkeypatch):
    with pytest.raises(TooLarge, match="side files: expected at most 64, got 65"):
        add("det", 1, MODEL, **{f"a{i}": A for i in range(65)})
    monkeypatch.setattr(sidefiles, "MAX_BLOB_BYTES", len(A) + len(B) - 1)
    with pytest.raises(TooLarge, match="bytes in all"):
        add("det", 1, MODEL, **{"a.bin": A, "b.bin": B})
    assert node.entries() == []
    assert len(add("det", 1, MODEL, **{"a.bin": A}).files) == 1


def test_an_empty_file_is_not_signed(node, add):
    with pytest.raises(TooLarge, match=r"'a\.bin': expected 1 to .* bytes, got 0"):
        add("det", 1, MODEL, **{"a.bin": b""})
    assert node.entries() == []


# -- what others signed ------------------------------------------------------------------------------------


def target(path, data, **custom):
    return TargetFile.from_data(path, data, ["sha256"]) if not custom else _with(path, data, custom)


def _with(path, data, custom):
    made = TargetFile.from_data(path, data, ["sha256"])
    made.unrecognized_fields["custom"] = custom
    return made


def digest_of(data):
    return f"sha256:{TargetFile.from_data('x', data, ['sha256']).hashes['sha256']}"


def signed_by_somebody(files, **beside):
    manifest = msgspec.json.encode(Manifest(name="det", version=1)).decode()
    made = {"models/det/1.onnx": target("models/det/1.onnx", MODEL, manifest=manifest, files=files)}
    for name, data in beside.items():
        made[f"models/det/1/{name}"] = target(f"models/det/1/{name}", data)
    good = target("models/cls/1.onnx", OTHER, manifest=manifest)
    return {**made, "models/cls/1.onnx": good}


@pytest.mark.parametrize(
    ("files", "beside", "sentence"),
    [
        (
            {"a.bin": digest_of(A)},
            {},
            "side file 'a.bin': expected it signed by the same role, as a target of its own, got none",
        ),
        ({"a.bin": digest_of(A)}, {"A.bin": A}, "side file 'a.bin': expected it signed"),
        (
            {"a.bin": digest_of(A)},
            {"a.bin": B},
            f"expected {digest_of(A)}, as its model says, got {digest_of(B)}",
        ),
        (
            {"a.bin": digest_of(A), "b.bin": digest_of(B)},
            {"a.bin": A},
            "side file 'b.bin': expected it signed",
        ),
        ({"a.bin": "md5:00"}, {"a.bin": A}, "expected md5:00, as its model says"),
        ({"a.bin": 7}, {"a.bin": A}, "side files: expected names with digests"),
        (["a.bin"], {"a.bin": A}, "side files: expected names with digests"),
        ({"../a.bin": digest_of(A)}, {"a.bin": A}, "side file: expected a plain name"),
        ({"a.bin": digest_of(A), "A.bin": digest_of(A)}, {"a.bin": A, "A.bin": A}, "differs in case only"),
        ({"a.bin": digest_of(b"")}, {"a.bin": b""}, "expected 1 to"),
        ({f"a{i}": digest_of(A) for i in range(65)}, {}, "expected at most 64, got 65"),
    ],
)
def test_half_a_model_is_none_and_harms_no_other(tmp_path, files, beside, sentence):
    chain = chain_of(signed_by_somebody(files, **beside))
    entries, problems = targets.read_all(chain, BlobStore(tmp_path))
    assert [(entry.name, entry.files) for entry in entries] == [("cls", ())]
    assert sentence in next(problem for problem in problems if problem.startswith("models/det/1.onnx: "))


def test_a_file_that_no_model_names_is_a_problem(tmp_path):
    signed = signed_by_somebody({}, **{"a.bin": A})
    signed["models/gone/1/a.bin"] = target("models/gone/1/a.bin", A)
    entries, problems = targets.read_all(chain_of(signed), BlobStore(tmp_path))
    assert [entry.name for entry in entries] == ["cls", "det"]
    assert [problem.partition(":")[0] for problem in problems] == [
        "models/det/1/a.bin",
        "models/gone/1/a.bin",
    ]


def top(*delegated):
    """Top-level targets that delegate to these, each a role with its paths; all terminating."""
    key = CryptoSigner.generate_ed25519().public_key
    named = {
        role: DelegatedRole(role, [key.keyid], 1, terminating=True, paths=list(paths))
        for role, paths in delegated
    }
    return Targets(1, expires=NOON, delegations=Delegations({key.keyid: key}, named))


def read_signed(tmp_path, delegated, **signed):
    """What is read of a chain; `signed` is what each role has signed."""
    documents = {role: Targets(1, expires=NOON, targets=named) for role, named in signed.items()}
    chain = replace(chain_of({}), roles={"targets": top(*delegated), **documents})
    return targets.read_all(chain, BlobStore(tmp_path))


def test_a_model_and_its_files_are_signed_by_one_role(tmp_path):
    """With delegations of the kind that another tool makes: nobody's half comes with somebody else's."""
    signed = signed_by_somebody({"a.bin": digest_of(A)}, **{"a.bin": A})
    side = {path: signed.pop(path) for path in list(signed) if sidefiles.is_path(path)}
    both = ["models/*/*", "models/*/*/*"]

    entries, problems = read_signed(tmp_path, [("one", ["models/*/*"]), ("two", both)], one=signed, two=side)
    assert [entry.name for entry in entries] == ["cls"]
    assert [problem.partition(":")[0] for problem in problems] == ["models/det/1.onnx", "models/det/1/a.bin"]

    entries, problems = read_signed(tmp_path, [("one", ["models/*/*"])], one=signed | side)
    assert [entry.name for entry in entries] == ["cls"]
    assert len(problems) == 1

    entries, problems = read_signed(tmp_path, [("one", both)], one=signed | side)
    assert [(entry.name, len(entry.files)) for entry in entries] == [("cls", 0), ("det", 1)]
    assert problems == ()


def test_a_file_of_one_role_is_not_replaced_by_another_roles(tmp_path):
    mine = signed_by_somebody({"a.bin": digest_of(A)}, **{"a.bin": A})
    theirs = signed_by_somebody({"a.bin": digest_of(B)}, **{"a.bin": B})
    paths = [("one", teams.paths_of(["det"])), ("two", teams.CATCH_ALL_PATHS)]
    entries, _ = read_signed(tmp_path, paths, one=mine, two=theirs)
    det = next(entry for entry in entries if entry.name == "det")
    assert (det.role, det.files[0].digest) == ("one", digest_of(A))


@pytest.mark.parametrize(
    ("lost", "short", "fault"),
    [(["a.bin"], [], MISSING), ([], ["a.bin"], TAMPERED), (["a.bin"], ["b.bin"], TAMPERED), ([], [], "")],
)
def test_the_fault_of_a_version_is_the_worst_of_its_files(node, add, lost, short, fault):
    entry = add("det", 1, MODEL, **{"a.bin": A, "b.bin": B})
    for found in entry.files:
        if found.name in lost:
            node.blobs.discard(found.digest)
        if found.name in short:
            path = node.blobs.path(found.digest)
            path.chmod(0o600)
            path.write_bytes(b"short")
    (now,) = node.entries()
    assert (now.fault, now.installed) == (fault, not fault)
    assert now.is_as(entry)


# -- removing ----------------------------------------------------------------------------------------------


def test_removing_a_model_removes_its_files_and_those_of_no_other(node, add):
    add("det", 1, MODEL, **{"a.bin": A, "b.bin": B})
    add("det", 2, MODEL, **{"a.bin": A, "b.bin": C})
    node.remove("det", 1)
    assert sorted(signed_models(node.trusted())) == [
        "models/det/2.onnx",
        "models/det/2/a.bin",
        "models/det/2/b.bin",
    ]
    assert stored(node) == sorted([MODEL, A, C])
    assert node.listing().problems == ()
    node.remove("det")
    assert stored(node) == []
    assert signed_models(node.trusted()) == {}


def test_garbage_is_collected_and_no_file_of_a_model(node, add, file):
    add("det", 1, MODEL, **{"a.bin": A})
    node.blobs.ingest_file(file(B))
    node.collect_garbage()
    assert stored(node) == sorted([MODEL, A])


# -- bundles -----------------------------------------------------------------------------------------------


def test_a_bundle_carries_a_model_with_its_files(node, add, follower, tmp_path):
    entry = add("det", 1, MODEL, **{"a.bin": A, "b.bin": B, "same.bin": B})
    out = tmp_path / "det.tar"
    assert bundle.export(node, [("det", None)], out) == [entry]
    seen = []
    assert bundle.import_bundle(follower, out, progress=lambda *at: seen.append(at)) == [entry]
    assert have(follower)["det", 1] == (True, ["a.bin", "b.bin", "same.bin"])
    follower.check(follower.find("det"))
    assert seen[-1] == (len(MODEL + A + B),) * 2
    again = tmp_path / "again.tar"
    bundle.export(follower, [("det", 1)], again)
    assert again.read_bytes() == out.read_bytes()


def test_a_bundle_with_a_changed_file_changes_nothing(node, add, follower, tmp_path):
    add("det", 1, MODEL, **{"a.bin": A})
    out = tmp_path / "det.tar"
    bundle.export(node, [("det", 1)], out)
    before = tree(follower.home)
    out.write_bytes(out.read_bytes().replace(A, b"X" + A[1:]))
    with pytest.raises(Untrusted, match="expected sha256:"):
        bundle.import_bundle(follower, out)
    assert tree(follower.home) == before


def test_a_bundle_restores_a_file_that_was_lost(node, add, follower, tmp_path):
    entry = add("det", 1, MODEL, **{"a.bin": A})
    out = tmp_path / "det.tar"
    bundle.export(node, [("det", 1)], out)
    bundle.import_bundle(follower, out)
    follower.blobs.discard(entry.files[0].digest)
    assert have(follower)["det", 1][0] is False
    bundle.import_bundle(follower, out)
    assert have(follower)["det", 1][0] is True


def test_what_cannot_be_carried_whole_is_not_exported(node, add, tmp_path):
    entry = add("det", 1, MODEL, **{"a.bin": A})
    damage(node, entry.files[0])
    with pytest.raises(Untrusted):
        bundle.export(node, [("det", 1)], tmp_path / "det.tar")
    assert not (tmp_path / "det.tar").exists()


def test_admitting_again_takes_whole_versions_only(node, add, tmp_path):
    """Versions 1 and 2 share the model file and one file beside it, so a bundle of 1 holds parts of 2."""
    add("det", 1, MODEL, **{"a.bin": A, "b.bin": B})
    add("det", 2, MODEL, **{"a.bin": A, "b.bin": C})
    add("cls", 1, OTHER, **{"a.bin": A})
    out = tmp_path / "det.tar"
    bundle.export(node, [("det", 1)], out)
    node.remove("det")
    node.remove("cls")
    assert [(e.name, e.version) for e in bundle.import_bundle(node, out, resign=True)] == [("det", 1)]
    assert node.listing().problems == ()
    assert have(node) == {("det", 1): (True, ["a.bin", "b.bin"])}
    node.check(node.find("det"))
    before = node.trusted().revision
    bundle.import_bundle(node, out, resign=True)  # of what is there
    assert node.trusted().revision == before


# -- an operator's repository ------------------------------------------------------------------------------


@pytest.fixture
def office():
    with memory_folder() as place:
        office = Office(place)
        office.alone(office.ann)
        offices.delegate(office.open(), "vision", ["vision-*", "eye"], holders(office.ann))
        yield office


def put(office, name, model, version=None, **files):
    beside = {file: office.model(data.decode()) for file, data in files.items()}
    return stock.add(office.open(), office.model(model.decode()), name, version, files=beside)


def following(office):
    """A device that trusts the repository's first root."""
    device = registry_at(office.place / f"device-{len(list(office.place.iterdir()))}", office.clock)
    device.init_follower((office.folder / "metadata/1.root.json").read_bytes())
    return device


def signed_in(office, role):
    return sorted(office.open().look().documents[role].targets)


def test_a_repository_signs_publishes_and_hands_on_the_files_beside_models(office):
    eye, role, outcome = put(office, "vision-eye", MODEL, **{"w.bin": A, "v.bin": B})
    assert (role, outcome.waiting) == ("models-vision", [])
    det, role, _ = put(office, "det", MODEL, **{"w.bin": C})
    assert role == "models"
    assert signed_in(office, "models-vision") == [
        "models/vision-eye/1.onnx",
        "models/vision-eye/1/v.bin",
        "models/vision-eye/1/w.bin",
    ]
    again, _, outcome = put(office, "det", MODEL, 1, **{"w.bin": C})
    assert (again, outcome.published) == (det, {})
    with pytest.raises(InvalidRequest, match="exists: expected the side files"):
        put(office, "det", MODEL, 1)
    public = office.place / "public"
    publish(office.open(), public)
    assert publish(office.open(), public).files == 0
    root = office.folder / "metadata/1.root.json"
    found = fetched(public, office.place / "cache", root, "models/vision-eye/1/w.bin", "models/det/1/w.bin")
    assert found == {"models/vision-eye/1/w.bin": A.decode(), "models/det/1/w.bin": C.decode()}

    device = following(office)
    assert bundle.inspect(device, public).entries == tuple(sorted([eye, det], key=lambda entry: entry.name))
    bundle.import_bundle(device, public)
    assert device.listing().problems == ()
    assert have(device) == {("det", 1): (True, ["w.bin"]), ("vision-eye", 1): (True, ["v.bin", "w.bin"])}
    for entry in device.entries():
        device.check(entry)
    carried = office.place / "eye.tar"
    bundle.export(device, [("vision-eye", None)], carried)
    other = following(office)
    assert [entry.name for entry in bundle.import_bundle(other, carried)] == ["vision-eye"]
    other.check(other.find("vision-eye"))
    assert [entry.fault for entry in other.entries()] == [MISSING, ""]


def test_a_folder_that_lacks_a_file_brings_no_half_model(office):
    put(office, "det", MODEL, **{"w.bin": A, "v.bin": B})
    put(office, "eye", MODEL, **{"w.bin": A})
    public = office.place / "public"
    publish(office.open(), public)
    next((public / "targets/models/det/1").glob("*.v.bin")).unlink()
    device = following(office)
    assert {entry.name: entry.installed for entry in bundle.inspect(device, public).entries} == {
        "det": False,
        "eye": True,
    }
    assert [entry.name for entry in bundle.import_bundle(device, public)] == ["eye"]
    assert stored(device) == sorted([MODEL, A])
    publish(office.open(), public)
    assert [entry.name for entry in bundle.import_bundle(device, public)] == ["det", "eye"]
    assert stored(device) == sorted([MODEL, A, B])


def test_a_file_of_other_bytes_in_the_folder_is_refused(office):
    put(office, "det", MODEL, **{"w.bin": A})
    public = office.place / "public"
    publish(office.open(), public)
    (path,) = (public / "targets/models/det/1").iterdir()
    path.unlink()
    path.write_bytes(b"X" + A[1:])
    device = following(office)
    with pytest.raises(Untrusted, match="expected sha256:"):
        bundle.import_bundle(device, public)
    assert device.entries() == []


def test_removing_in_a_repository_takes_the_files_too_and_those_of_no_other(office):
    put(office, "eye", MODEL, **{"w.bin": A, "v.bin": B})
    put(office, "eye", MODEL, **{"w.bin": A, "v.bin": C})
    public = office.place / "public"
    publish(office.open(), public)
    device = following(office)
    bundle.import_bundle(device, public)
    old = office.place / "old.tar"
    bundle.export(device, [("eye", 2)], old)
    gone, again, _ = stock.remove(office.open(), "eye", 2, revoke=True)
    assert [(entry.version, len(entry.files)) for entry in gone + again] == [(2, 2), (1, 2)]
    assert signed_in(office, "models-vision") == [
        "models/eye/1.onnx",
        "models/eye/1/v.bin",
        "models/eye/1/w.bin",
    ]
    assert stored(office.open()) == sorted([MODEL, A, B])
    publish(office.open(), public)
    bundle.import_bundle(device, public)
    assert have(device) == {("eye", 1): (True, ["v.bin", "w.bin"])}
    assert device.listing().problems == ()
    assert stored(device) == sorted([MODEL, A, B])
    with pytest.raises(Untrusted):
        bundle.import_bundle(device, old)
    with pytest.raises(InvalidRequest, match="expected a role without models, got one with 1"):
        offices.undelegate(office.open(), "vision")
    assert offices.undelegate(office.open(), "vision", with_models=True)[0] == ["models/eye/1.onnx"]
    office.open().refresh()
    assert stored(office.open()) == []


def test_a_role_that_may_sign_models_only_takes_none_with_files_until_it_is_delegated_again(office):
    """As somebody else's tool delegates, whose wildcard stops at the model."""
    repository = office.open()
    with repository.changing() as change:
        narrow = [
            roles.Delegation(
                item.role, tuple(path for path in item.paths if path.count("/") < 3), item.holders
            )
            for item in change.delegations
        ]
        change.redelegate(narrow)
        repository.settle(change)
    put(office, "eye", MODEL)
    with pytest.raises(InvalidRequest, match=r"eye/2/w\.bin: expected that models-vision may sign this path"):
        put(office, "eye", MODEL, **{"w.bin": A})
    assert signed_in(office, "models-vision") == ["models/eye/1.onnx"]
    offices.delegate(office.open(), "vision", ["vision-*", "eye"], None)
    assert put(office, "eye", MODEL, **{"w.bin": A})[0].version == 2


def test_people_read_names_of_models_and_no_paths_of_files():
    paths = teams.paths_of(["vision-*", "eye"])
    assert paths == ("models/vision-*/*", "models/vision-*/*/*", "models/eye/*", "models/eye/*/*")
    assert teams.patterns_of(paths) == ("vision-*", "eye")
    assert teams.patterns_of(teams.CATCH_ALL_PATHS) == ("*",)
    assert teams.patterns_of(["channels/*", "models/det/*", "models/x/*/*"]) == (
        "det",
        "channels/*",
        "models/x/*/*",
    )
    assert tuple(signing.MODEL_PATHS) == teams.CATCH_ALL_PATHS


def test_files_count_for_the_ceiling_of_a_repository_and_of_a_device(office, node, add, monkeypatch):
    monkeypatch.setattr(stock, "MAX_FILES", 3)
    monkeypatch.setattr(registry, "MAX_FILES", 3)
    with pytest.raises(TooLarge, match="at most 3 files of models"):
        put(office, "det", MODEL, **{"a.bin": A, "b.bin": B, "c.bin": C})
    with pytest.raises(TooLarge, match="at most 3 files of models"):
        add("det", 1, MODEL, **{"a.bin": A, "b.bin": B, "c.bin": C})
    put(office, "det", MODEL, **{"a.bin": A, "b.bin": B})
    add("det", 1, MODEL, **{"a.bin": A, "b.bin": B})


# -- beside a model on the disk ----------------------------------------------------------------------------


def test_only_regular_files_beside_the_model_are_sealed(tmp_path, file):
    model = file(MODEL, "model.onnx")
    file(A, "a.bin")
    sealed = seal_beside(model, "a.bin")
    os.close(sealed.fd)
    assert sealed[1:] == (digest_of(A), len(A))
    (tmp_path / "link.bin").symlink_to("a.bin")
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(InvalidRequest, match=r"link\.bin: expected a file, got a symbolic link"):
        seal_beside(model, "link.bin")
    for name in ("folder.bin", "pipe.bin"):
        with pytest.raises(StorageFailed, match=name):
            seal_beside(model, name)
    with pytest.raises(
        NotFound, match=r"b\.bin: no such file, and model.onnx says that values of it are in there"
    ):
        seal_beside(model, "b.bin")


def test_a_model_that_is_reached_by_a_link_has_its_files_beside_the_link(tmp_path, file):
    (tmp_path / "sub").mkdir()
    link = tmp_path / "sub" / "model.onnx"
    link.symlink_to(file(MODEL, "real.onnx"))
    (tmp_path / "sub" / "a.bin").write_bytes(A)
    sealed, beside = seal_file(link), seal_beside(link, "a.bin")
    os.close(sealed.fd)
    os.close(beside.fd)
    assert (sealed.size_bytes, beside.size_bytes) == (len(MODEL), len(A))
