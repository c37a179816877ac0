"""`skerry model …` and `skerry trust …` on a real registry with real models, without a daemon."""

import json
import os
import stat

import numpy as np
import pytest
import zoo
from fakedaemon import FakeDaemon
from maker import Maker
from typer.testing import CliRunner

from agent.cli import admit, exits
from agent.cli.app import app
from agent.paths import resolve
from store.listing import Listing
from store.registry import Registry


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def skerry(home):
    def run(*arguments, at=home):
        return CliRunner().invoke(app, ["--home", str(at), *map(str, arguments)], prog_name="skerry")

    return run


@pytest.fixture
def model(tmp_path):
    """model(bytes) -> a file that holds them."""

    def write(data, name="model.onnx"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def listed(skerry):
    return [
        (entry["name"], entry["version"])
        for entry in json.loads(skerry("model", "list", "--json").stdout)["models"]
    ]


def blob_of(home, digest):
    return home / "registry/blobs/sha256" / digest[7:9] / digest[7:]


def test_add_checks_signs_and_lists(skerry, model, home):
    result = skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    assert result.exit_code == exits.OK, result.stderr
    said = {line.split()[0]: line for line in result.stderr.splitlines()}
    assert list(said) == ["sealed", "checked", "loaded", "signed", "no"]
    assert "-> " in said["loaded"]
    assert "it will be served when one starts" in said["no"]
    assert listed(skerry) == [("alpha", 1)]
    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700


def test_versions_count_up_and_two_models_stay_apart(skerry, model):
    for data, name in ((zoo.add(1), "alpha"), (zoo.scale(2), "beta"), (zoo.add(2), "alpha")):
        assert skerry("model", "add", model(data), "--name", name).exit_code == exits.OK
    assert listed(skerry) == [("alpha", 1), ("alpha", 2), ("beta", 1)]
    result = skerry("model", "remove", "alpha", "--version", "1")
    assert result.stderr.startswith("removed alpha/1, sha256:")
    assert listed(skerry) == [("alpha", 2), ("beta", 1)]
    assert skerry("model", "remove", "alpha").exit_code == exits.OK
    assert listed(skerry) == [("beta", 1)]
    assert skerry("model", "remove", "alpha").exit_code == exits.NOT_FOUND


def test_the_manifest_is_signed_and_shown(skerry, model, tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(
        "name: alpha\nlicence: MIT\nlabels: {task: demo}\ncache: {policy: exact, scope: shared, ttl: 5m}\n"
    )
    assert skerry("model", "add", model(zoo.add(1)), "--manifest", manifest).exit_code == exits.OK
    (shown,) = json.loads(skerry("model", "show", "alpha", "--json").stdout)["models"]
    assert shown["manifest"]["licence"] == "MIT"
    assert shown["manifest"]["cache"] == {"policy": "exact", "scope": "shared", "ttl": "5m"}
    lines = [" ".join(line.split()) for line in skerry("model", "show", "alpha").stdout.splitlines()]
    assert "labels.task demo" in lines
    assert f"digest {shown['digest']}" in lines
    assert "installed yes" in lines


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("licence: MIT\nlabls: {}\n", 2, "unknown key 'labls'", "did you mean labels?"),
        ("cache:\n  polcy: exact\n", 2, "unknown key 'cache.polcy'", "did you mean policy?"),
        ("warmup:\n- inputs: {x: [1]}\n- inputs: {x: [1]}\n  outpts: {}\n", 4, "'warmup.outpts'", "outputs"),
        ("cache: {policy: yes}\n", 1, "cache.policy: ", ""),
        ("threads: -1\n", 1, "threads: ", ""),
        ("golden:\n- inputs: {x: [1]}\n  tolerance: -1\n", 3, "golden.tolerance: ", ""),
        ("labels: [1]\n", 1, "labels: ", ""),
        ("licence: MIT\ngroup: a b\n", 2, "group: ", ""),
        ("- 1\n", 1, "manifest: ", ""),
    ],
)
def test_a_wrong_manifest_names_line_and_key(skerry, model, tmp_path, text, line, message, hint):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(text)
    result = skerry("model", "add", model(zoo.add(1)), "--name", "a", "--manifest", manifest)
    assert result.exit_code == exits.USAGE
    assert f"{manifest}:{line}: " in result.stderr
    assert message in result.stderr
    assert hint in result.stderr
    assert listed(skerry) == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("cache: {ttl: soon}", "2: cache.ttl"),
        ("limits: {memory: 2 GB}", "2: limits.memory"),
        ("limits:\n  timeout: x", "3: limits.timeout"),
        ("limits: {timeout: 0s}", "2: limits.timeout"),
        ("limits: {memory: 1MiB}", "2: limits.memory"),
        ("policy: max_eficiency", "2: policy"),
    ],
)
def test_values_that_no_node_accepts_are_refused_before_signing(skerry, model, tmp_path, text, where):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(f"# first line\n{text}")
    result = skerry("model", "add", model(zoo.add(1)), "--name", "a", "--manifest", manifest)
    assert result.exit_code == exits.USAGE
    assert f"m.yaml:{where}: expected" in result.stderr
    assert listed(skerry) == []


@pytest.mark.parametrize("bad", ["garbage", "truncated", "empty", "external_data", "future_opset"])
def test_what_is_no_servable_model_is_refused_and_nothing_is_signed(skerry, model, bad):
    builders = {
        "garbage": zoo.garbage,
        "truncated": lambda: zoo.truncated(zoo.mlp()),
        "empty": zoo.empty,
        "external_data": lambda: zoo.external_data("../../etc/passwd"),
        "future_opset": zoo.future_opset,
    }
    result = skerry("model", "add", model(builders[bad]()), "--name", "a")
    assert result.exit_code == exits.USAGE, result.stderr
    assert "error: " in result.stderr
    assert listed(skerry) == []


def test_a_version_over_the_ceiling_is_refused_and_named(skerry, model):
    result = skerry("model", "add", model(zoo.add(1)), "--name", "a", "--version", 10**30)
    assert result.exit_code == exits.USAGE
    assert "model version: expected an integer from 1 to 9007199254740991, got '1000000" in result.stderr


def test_a_model_without_a_name_or_with_two_is_refused(skerry, model, tmp_path):
    result = skerry("model", "add", model(zoo.add(1)))
    assert (result.exit_code, "give --name" in result.stderr) == (exits.USAGE, True)
    manifest = tmp_path / "m.yaml"
    manifest.write_text("name: beta")
    result = skerry("model", "add", model(zoo.add(1)), "--name", "alpha", "--manifest", manifest)
    assert (result.exit_code, listed(skerry)) == (exits.USAGE, [])
    assert skerry("model", "add", model(zoo.add(1)), "--name", "../x").exit_code == exits.USAGE
    assert skerry("model", "add", tmp_path / "none.onnx", "--name", "x").exit_code == exits.USAGE


def test_verify_names_the_damaged_model_and_both_digests(skerry, model, home):
    for data, name in ((zoo.add(1), "alpha"), (zoo.scale(2), "beta")):
        skerry("model", "add", model(data), "--name", name)
    assert skerry("model", "verify").stdout == "alpha/1: ok\nbeta/1: ok\n"
    (shown,) = json.loads(skerry("model", "show", "beta", "--json").stdout)["models"]
    blob = blob_of(home, shown["digest"])
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.unlink()
    blob.write_bytes(data)
    result = skerry("model", "verify")
    assert result.exit_code == exits.UNTRUSTED
    alpha, beta = result.stdout.splitlines()
    assert alpha == "alpha/1: ok"
    assert shown["digest"] in beta
    assert beta.count("sha256:") == 2
    assert skerry("model", "verify", "alpha").exit_code == exits.OK
    found = json.loads(skerry("model", "verify", "beta", "--json").stdout)["models"]
    assert shown["digest"] in found[0]["problem"]


def test_verify_fails_for_what_is_signed_and_not_understood(skerry, monkeypatch):
    sentence = "models/new/1.onnx: signed, but not understood: a newer kind"
    monkeypatch.setattr(Registry, "listing", lambda _self: Listing(1, owner=True, problems=(sentence,)))
    result = skerry("model", "verify")
    assert (result.exit_code, result.stdout) == (exits.UNTRUSTED, f"{sentence}\n")


def test_a_bundle_travels_to_a_node_that_follows_and_not_to_a_stranger(skerry, model, home, tmp_path):
    skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    bundle, other, stranger = tmp_path / "b.tar", tmp_path / "other", tmp_path / "stranger"
    assert skerry("bundle", "export", "alpha", "-o", bundle).exit_code == exits.OK
    facts = json.loads(skerry("trust", "show", "--json").stdout)
    assert facts["mode"] == "owner"
    assert skerry("trust", "init", "--root", facts["root"], at=other).exit_code == exits.OK
    follower = json.loads(skerry("trust", "show", "--json", at=other).stdout)
    assert (follower["mode"], follower["fingerprint"]) == ("follower", facts["fingerprint"])
    result = skerry("bundle", "import", bundle, at=other)
    assert result.exit_code == exits.OK, result.stderr
    assert "imported alpha/1" in result.stderr
    assert skerry("model", "verify", at=other).exit_code == exits.OK
    assert skerry("model", "add", model(zoo.add(2)), "--name", "alpha", at=other).exit_code == exits.DENIED
    refused = skerry("bundle", "import", bundle, at=stranger)
    assert refused.exit_code not in {exits.OK, exits.FAILED}
    assert "trust init" in refused.stderr


def test_the_owner_can_take_back_what_was_removed(skerry, model, tmp_path):
    skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    bundle = tmp_path / "b.tar"
    skerry("bundle", "export", "alpha", "-o", bundle)
    skerry("model", "remove", "alpha")
    assert listed(skerry) == []
    result = skerry("bundle", "import", bundle)
    assert result.exit_code == exits.OK, result.stderr
    assert listed(skerry) == [("alpha", 1)]


def test_a_home_that_trusts_nobody_says_so(skerry):
    facts = json.loads(skerry("trust", "show", "--json").stdout)
    assert facts == {"mode": "none", "fingerprint": "", "root_version": None, "revision": 0, "root": None}
    assert "no root yet" in skerry("trust", "show").stdout


# -- provenance


@pytest.fixture(scope="module")
def maker():
    """Certified until long after these tests are run: the command line goes by the real clock."""
    return Maker(days=36_500)


@pytest.fixture
def claim(maker, tmp_path):
    """claim(files) -> the options that name a bundle about them and the maker's key, or the authority."""

    def write(files, *, certified=False):
        (tmp_path / "model.sig").write_bytes(maker.sign(files, certified=certified))
        (tmp_path / "maker.pem").write_bytes(maker.authority_pem if certified else maker.pem)
        option = "--provenance-ca" if certified else "--provenance-key"
        return ["--provenance", tmp_path / "model.sig", option, tmp_path / "maker.pem"]

    return write


@pytest.mark.parametrize("certified", [False, True])
def test_who_made_a_model_is_checked_signed_and_shown(skerry, model, claim, certified):
    data = zoo.add(1)
    options = claim({"model.onnx": data, "README": b""}, certified=certified)
    result = skerry("model", "add", model(data), "--name", "alpha", *options)
    assert result.exit_code == exits.OK, result.stderr
    assert skerry("model", "add", model(zoo.scale(2)), "--name", "beta").exit_code == exits.OK
    (shown,) = json.loads(skerry("model", "show", "alpha", "--json").stdout)["models"]
    record = shown["provenance"]
    assert (record["model"], record["files"]) == (shown["digest"], 2)
    line = f"{record['method']} {record['signer']}, 2 files, bundle {record['bundle']}"
    assert record["signer"].startswith("CN=Example" if certified else "sha256:")
    assert f"made by    {line}" in result.stderr
    folded = "".join(skerry("model", "show", "alpha").stdout.split())
    assert f"provenance{line}".replace(" ", "") in folded
    assert "provenance" not in skerry("model", "show", "beta").stdout


def test_a_model_that_its_maker_did_not_sign_is_not_signed_here_either(skerry, model, claim, home):
    options = claim({"model.onnx": zoo.add(1)})
    for file, complaint in (
        (model(zoo.add(2)), "as signed"),
        (model(zoo.add(1), "other.onnx"), "signed file"),
    ):
        result = skerry("model", "add", file, "--name", "alpha", *options)
        assert result.exit_code == exits.UNTRUSTED
        assert complaint in result.stderr
    assert listed(skerry) == []
    assert not (home / "keys").exists()


def test_a_provenance_needs_a_bundle_and_one_anchor(skerry, model, claim):
    options = claim({"model.onnx": zoo.add(1)})
    key = options[-1]
    for wrong in (options[:2], options[2:], [*options, "--provenance-ca", key]):
        result = skerry("model", "add", model(zoo.add(1)), "--name", "alpha", *wrong)
        assert result.exit_code == exits.USAGE
        assert "expected a bundle and one of --provenance-key and --provenance-ca" in result.stderr


def test_of_a_directory_every_file_has_to_be_signed(skerry, tmp_path, claim):
    files = {"1/model.onnx": zoo.add(1), "3/model.onnx": zoo.add(3), "labels.txt": b"a"}
    for name, data in files.items():
        path = tmp_path / "alpha" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    add = ["model", "add", tmp_path / "alpha", "--all-versions", *claim(files)]
    (tmp_path / "alpha/labels.txt").write_bytes(b"b")
    assert skerry(*add).exit_code == exits.UNTRUSTED
    assert listed(skerry) == []
    (tmp_path / "alpha/labels.txt").write_bytes(b"a")
    assert skerry(*add).exit_code == exits.OK
    models = json.loads(skerry("model", "list", "--json").stdout)["models"]
    assert [(each["version"], each["provenance"]["model"]) for each in models] == [
        (1, models[0]["digest"]),
        (3, models[1]["digest"]),
    ]


def daemon_that_says(home, **model):
    page = {"models": [{"name": "alpha", "version": "1", "device": "CPU", **model}]}
    pages = {"POST /skerry/v1/registry/refresh": page, "GET /skerry/v1/models": page}
    return FakeDaemon(resolve(str(home), {}, os.geteuid()).socket, pages)


def test_add_waits_until_the_daemon_serves_and_shows_how_to_ask(skerry, model, home):
    with daemon_that_says(home, state="READY", reason="") as daemon:
        result = skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    assert result.exit_code == exits.OK, result.stderr
    assert "serving    alpha/1 on CPU" in result.stderr
    assert "curl --unix-socket " in result.stderr
    assert [path for _, path, _ in daemon.asked] == ["/skerry/v1/registry/refresh", "/skerry/v1/models"]


def test_add_reports_why_the_daemon_does_not_serve(skerry, model, home):
    with daemon_that_says(home, state="UNAVAILABLE", reason="no device took it"):
        result = skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
        assert skerry("model", "add", model(zoo.add(1)), "--name", "alpha", "--no-wait").exit_code == exits.OK
    assert result.exit_code == exits.UNAVAILABLE
    assert "alpha/1: signed, and not served: no device took it" in result.stderr
    assert listed(skerry) == [("alpha", 1), ("alpha", 2)]


def test_add_does_not_wait_for_ever(skerry, model, home, monkeypatch):
    monkeypatch.setattr(admit, "SERVED_S", 0.0)
    with daemon_that_says(home, state="LOADING", reason=""):
        result = skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    assert result.exit_code == exits.UNAVAILABLE
    assert "neither served nor refused" in result.stderr


def test_the_infer_example_for_big_inputs_names_files(skerry, model, home):
    data = zoo.magika_model().read_bytes()
    with daemon_that_says(home, state="READY", reason=""):
        result = skerry("model", "add", model(data), "--name", "alpha")
    assert f"skerry --home {home} infer alpha --input bytes=@bytes.npy" in result.stderr


def infer_pages(datatype, output):
    spec = [{"name": "x", "datatype": datatype, "shape": [-1, -1]}]
    return {
        "GET /v2/models/m": {"name": "m", "versions": ["1"], "platform": "", "inputs": spec, "outputs": spec},
        "POST /v2/models/m/infer": {"model_name": "m", "model_version": "1", "outputs": [output]},
    }


@pytest.fixture
def ask(home, skerry):
    """ask(datatype, value) -> (the tensor bytes that were sent, the result)."""

    def run(datatype, value, *options, output=None):
        output = output or {"name": "y", "datatype": "FP32", "shape": [2], "data": [1.5, float("inf")]}
        with FakeDaemon(resolve(str(home), {}, os.geteuid()).socket, infer_pages(datatype, output)) as daemon:
            result = skerry("infer", "m", "--input", f"x={value}", *options)
        posted = [body for method, _, body in daemon.asked if method == "POST"]
        return (posted[0][posted[0].rindex(b"}") + 1 :] if posted else None), result

    return run


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("FP32", "[[1, 2.5]]", np.array([1, 2.5], np.float32).tobytes()),
        ("INT8", "[[-1, 2]]", b"\xff\x02"),
        ("BOOL", "[[true, false]]", b"\x01\x00"),
        ("FP16", "[[1]]", np.array([1], np.float16).tobytes()),
        ("BF16", "[[1, -2]]", b"\x80\x3f\x00\xc0"),
        ("BYTES", '[["ab", ""]]', b"\x02\x00\x00\x00ab\x00\x00\x00\x00"),
    ],
)
def test_typed_numbers_become_what_the_model_wants(ask, datatype, value, expected):
    sent, result = ask(datatype, value)
    assert result.exit_code == exits.OK, result.stderr
    assert sent == expected


def test_files_are_read_and_wide_arrays_narrowed(ask, tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1.0, 2.0]]))
    (tmp_path / "a.json").write_text("[[3, 4]]")
    assert ask("FP32", f"@{tmp_path}/a.npy")[0] == np.array([1, 2], np.float32).tobytes()
    assert ask("FP32", f"@{tmp_path}/a.json")[0] == np.array([3, 4], np.float32).tobytes()


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("[[1.5, 2]]", "no integer"),
        ("[[1, 1e3]]", "no integer"),
        ("@/dev/zero", "expected a file, got a device"),
    ],
)
def test_what_is_no_integer_or_has_no_end_is_refused(ask, value, complaint):
    sent, result = ask("INT32", value)
    assert (sent, result.exit_code) == (None, exits.USAGE)
    assert complaint in result.stderr


def test_an_input_that_is_given_twice_is_refused(ask):
    sent, result = ask("INT32", "[[1, 2]]", "--input", "x=[[3, 4]]")
    assert (sent, result.exit_code) == (None, exits.USAGE)
    assert "expected 'x' once" in result.stderr


def test_an_npy_file_is_data_and_never_code(ask, tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    np.save(tmp_path / "x.npy", np.array([Payload()], object), allow_pickle=True)
    sent, result = ask("BYTES", f"@{tmp_path}/x.npy")
    assert (sent, result.exit_code) == (None, exits.USAGE)
    assert not (tmp_path / "ran").exists()


def test_an_input_that_cannot_be_read_or_is_too_deep_is_refused_in_one_line(ask, tmp_path):
    for value in (f"@{tmp_path}", "[" * 100_000):
        sent, result = ask("FP32", value)
        assert (sent, result.exit_code) == (None, exits.USAGE)
        assert result.stderr.startswith("error: input 'x': ")


def test_json_output_of_infer_is_json_even_with_infinities(ask):
    _, result = ask("FP32", "[[1]]", "--json")
    assert json.loads(result.stdout) == {
        "model": "m",
        "version": "1",
        "cached": False,
        "outputs": {"y": {"datatype": "FP32", "shape": [2], "data": [1.5, None]}},
    }


def test_infer_shows_a_table_with_text_as_text(ask):
    output = {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["grün"]}
    _, result = ask("FP32", "[[1]]", output=output)
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "OUTPUT DATATYPE SHAPE VALUES",
        "label BYTES [1] grün",
    ]


def test_inputs_that_cannot_be_meant_are_refused_before_anything_is_asked(ask, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    for value in ("[[1, 2], [3]]", "nonsense", '["a"]', f"@{tmp_path}/objects.npy", f"@{tmp_path}/text.npy"):
        sent, result = ask("FP32", value)
        assert (sent, result.exit_code) == (None, exits.USAGE), value
    assert ask("BYTES", "[[1]]")[1].exit_code == exits.USAGE
    assert ask("INT8", "[[300]]")[1].exit_code == exits.USAGE
    assert ask("FP32", f"@{tmp_path}/none.npy")[1].exit_code == exits.NOT_FOUND


def test_an_unknown_input_names_the_real_ones(home, skerry):
    pages = infer_pages("FP32", {})
    with FakeDaemon(resolve(str(home), {}, os.geteuid()).socket, pages):
        result = skerry("infer", "m", "--input", "z=[1]")
        unequal = skerry("infer", "m", "--input", "z")
    assert (result.exit_code, "expected one of x, got 'z'" in result.stderr) == (exits.USAGE, True)
    assert (unequal.exit_code, "expected NAME=VALUE" in unequal.stderr) == (exits.USAGE, True)
