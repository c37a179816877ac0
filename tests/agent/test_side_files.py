"""Models with files beside them: added, signed, served, carried, and refused where a byte is not the signed one."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import zoo
from maker import Maker
from node import temporary_node
from traffic import infer, ready, row, until
from typer.testing import CliRunner

from agent.cli import exits
from agent.cli.app import app

INPUT = np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32)
PARTS = {"first": ["w1"], "second": ["b1", "w2", "b2"]}
MODEL, FILES = zoo.split(zoo.mlp(), **PARTS)
OTHER_FILES = zoo.split(zoo.mlp(9), **PARTS)[1]
EXACT = {"policy": "exact", "scope": "shared", "ttl": "1h"}


def skerry(home, *arguments):
    return CliRunner().invoke(app, ["--home", str(home), *map(str, arguments)], prog_name="skerry")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def exported(tmp_path):
    """exported(model, files) -> the model's path in a folder of its own, its files beside it."""
    made = []

    def export(model=MODEL, files=FILES):
        folder = tmp_path / f"exported-{len(made)}"
        folder.mkdir()
        made.append(folder / "model.onnx")
        made[-1].write_bytes(model)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return made[-1]

    return export


@pytest.fixture
def node():
    with temporary_node() as node:
        yield node


def listed(home):
    return json.loads(skerry(home, "model", "list", "--json").stdout)["models"]


def answer(node, name):
    status, document = infer(node, name, {"input": ("FP32", INPUT.tolist())})
    assert status == 200, document
    return np.array(document["outputs"][0]["data"], np.float32)


def blob(home, digest):
    return Path(home) / "registry/blobs/sha256" / digest[7:9] / digest[7:]


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def tampered(node, name, version=1):
    """Wait until a version is out of service for a changed file; what the audit log was told."""
    until(lambda: row(node, name, version)["state"] == "UNAVAILABLE", f"{name}/{version} out of service")
    until(lambda: row(node, name, version)["fault"] == "tampered", f"{name}/{version} tampered")
    log = json.loads(skerry(node.home, "audit", "--kind", "registry.tamper", "--json").stdout)
    (event,) = [event for event in log["events"] if event["subject"] == f"{name}/{version}"]
    return event["detail"]


# --- the command line


def test_add_seals_checks_loads_and_signs_the_files_that_the_model_names(home, exported):
    path = exported(files={**FILES, "unrelated.bin": b"not of this model"})
    result = skerry(home, "model", "add", path, "--name", "det")
    assert result.exit_code == exits.OK, result.stderr
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [
        "sealed",
        "sealed",
        "sealed",
        "checked",
        "loaded",
        "signed",
    ]
    assert lines[1].split()[1:2] + lines[2].split()[1:2] == ["first.bin:", "second.bin:"]
    assert "nothing outside it and the 2 files beside it" in lines[3]
    (found,) = listed(home)
    assert [file["name"] for file in found["files"]] == ["first.bin", "second.bin"]
    assert found["installed"]
    assert found["content_digest"] not in {found["digest"], *(file["digest"] for file in found["files"])}
    shown = [" ".join(line.split()) for line in skerry(home, "model", "show", "det").stdout.splitlines()]
    for file in found["files"]:
        assert any(line.startswith(f"files.{file['name']} {file['digest']}, ") for line in shown)
    assert skerry(home, "model", "verify").stdout == "det/1: ok\n"


def test_verify_names_a_file_that_was_changed(home, exported):
    skerry(home, "model", "add", exported(), "--name", "det")
    skerry(home, "model", "add", exported(zoo.mlp(), {}), "--name", "whole")
    digest = next(model for model in listed(home) if model["name"] == "det")["files"][1]["digest"]
    damage(blob(home, digest))
    result = skerry(home, "model", "verify")
    assert result.exit_code == exits.UNTRUSTED
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert said["whole/1"] == "ok"
    assert f"expected {digest}" in said["det/1"]
    assert said["det/1"].count("sha256:") == 2


def test_every_changed_file_of_a_version_is_put_aside_at_once(home, exported):
    skerry(home, "model", "add", exported(), "--name", "det")
    digests = [file["digest"] for file in listed(home)[0]["files"]]
    for digest in digests:
        damage(blob(home, digest))
    assert skerry(home, "model", "verify").exit_code == exits.UNTRUSTED
    assert {path.name for path in (home / "registry/damaged").iterdir()} == {digest[7:] for digest in digests}
    assert [(one["installed"], one["fault"]) for one in listed(home)] == [(False, "tampered")]
    assert skerry(home, "model", "add", exported(), "--name", "det", "--version", 1).exit_code == exits.OK
    assert skerry(home, "model", "verify").stdout == "det/1: ok\n"


def test_a_maker_has_to_have_signed_the_files_too(home, exported, tmp_path):
    maker = Maker()
    (tmp_path / "maker.pem").write_bytes(maker.pem)
    signature = tmp_path / "model.sig"
    options = ["--name", "det", "--provenance", signature, "--provenance-key", tmp_path / "maker.pem"]
    signed = {"model.onnx": MODEL, **FILES}
    for files, message in (
        ({"model.onnx": MODEL}, "expected a signed file 'first.bin'"),
        (signed | {"second.bin": OTHER_FILES["second.bin"]}, "this is not the file that its maker signed"),
    ):
        signature.write_bytes(maker.sign(files))
        result = skerry(home, "model", "add", exported(), *options)
        assert result.exit_code == exits.UNTRUSTED
        assert message in " ".join(result.stderr.split())
        assert listed(home) == []
    signature.write_bytes(maker.sign(signed))
    result = skerry(home, "model", "add", exported(), *options)
    assert result.exit_code == exits.OK, result.stderr
    assert listed(home)[0]["provenance"]["files"] == 3


def test_removing_a_model_leaves_nothing_of_it(home, exported):
    skerry(home, "model", "add", exported(), "--name", "det")
    assert skerry(home, "model", "remove", "det").exit_code == exits.OK
    assert [path for path in (Path(home) / "registry/blobs").rglob("*") if path.is_file()] == []


def missing(path):
    (path.parent / "second.bin").unlink()


def link(path):
    (path.parent / "second.bin").rename(path.parent / "elsewhere")
    (path.parent / "second.bin").symlink_to("elsewhere")


def truncated(path):
    (path.parent / "second.bin").write_bytes(FILES["second.bin"][:-1])


def empty(path):
    (path.parent / "second.bin").write_bytes(b"")


def other_case(path):
    (path.parent / "second.bin").rename(path.parent / "Second.bin")


@pytest.mark.parametrize(
    ("spoil", "status", "message"),
    [
        (
            missing,
            exits.NOT_FOUND,
            "second.bin: no such file, and model.onnx says that values of it are in there",
        ),
        (other_case, exits.NOT_FOUND, "second.bin: no such file"),
        (link, exits.USAGE, "second.bin: expected a file, got a symbolic link"),
        (truncated, exits.USAGE, "expected its values within the"),
        (empty, exits.USAGE, "expected its values within the 0 bytes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_are_not_what_the_model_says_are_refused_and_nothing_is_signed(
    home, exported, spoil, status, message
):
    path = exported()
    spoil(path)
    result = skerry(home, "model", "add", path, "--name", "det")
    assert result.exit_code == status
    assert message in " ".join(result.stderr.split())
    assert listed(home) == []


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/w.bin", "./w.bin", ""])
def test_a_model_cannot_name_a_file_elsewhere(home, exported, tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(64))
    result = skerry(
        home, "model", "add", exported(zoo.external_data(location), {"w.bin": bytes(64)}), "--name", "a"
    )
    assert result.exit_code == exits.USAGE
    assert "side file: expected a plain name beside the model" in " ".join(result.stderr.split())
    assert listed(home) == []


def test_values_beyond_the_end_of_a_file_are_refused(home, exported):
    result = skerry(
        home, "model", "add", exported(zoo.external_data("w.bin", 64), {"w.bin": bytes(60)}), "--name", "a"
    )
    assert result.exit_code == exits.USAGE
    assert "expected its values within the 60 bytes of 'w.bin', got 64 bytes from 0 on" in result.stderr


def test_a_file_may_have_the_name_of_another_models_file(home, exported):
    for name, location in (("a", "1.onnx"), ("b", "model.onnx.data"), ("c", "1")):
        path = exported(zoo.external_data(location), {location: bytes(64)})
        result = skerry(home, "model", "add", path, "--name", name)
        assert result.exit_code == exits.OK, result.stderr
    assert skerry(home, "model", "verify").exit_code == exits.OK
    assert [model["files"][0]["name"] for model in listed(home)] == ["1.onnx", "model.onnx.data", "1"]


# --- served


def test_it_is_served_like_the_model_that_is_one_file_here_and_where_it_is_carried(node, exported, tmp_path):
    node.add(zoo.mlp(), "whole")
    node.start()
    result = skerry(node.home, "model", "add", exported(), "--name", "det")
    assert result.exit_code == exits.OK, result.stderr
    assert "serving" in result.stderr
    expected = answer(node, "whole")
    np.testing.assert_array_equal(answer(node, "det"), expected)
    with node.client() as client:  # its worker answers after some of these by itself
        for _ in range(40):
            np.testing.assert_array_equal(
                client.infer("det", {"input": INPUT}).outputs["output"].ravel(), expected
            )
    assert skerry(node.home, "bundle", "export", "det", "-o", tmp_path / "det.tar").exit_code == exits.OK
    root = json.loads(skerry(node.home, "trust", "show", "--json").stdout)["root"]
    with temporary_node() as second:
        assert skerry(second.home, "trust", "init", "--root", root).exit_code == exits.OK
        second.start()
        assert skerry(second.home, "bundle", "import", tmp_path / "det.tar").exit_code == exits.OK
        ready(second, "det")
        np.testing.assert_array_equal(answer(second, "det"), expected)


def test_a_repository_signs_it_and_its_folder_and_bundles_bring_it_to_nodes_that_serve_it(
    node, exported, tmp_path
):
    def repo(*arguments):
        result = skerry(node.home, "repo", "--repo", tmp_path / "repo", *arguments)
        assert result.exit_code == exits.OK, result.stderr
        return result

    repo("init")
    added = repo("add", exported(), "--name", "det")
    assert [line.split()[0] for line in added.stderr.splitlines()][:6] == [
        "sealed",
        "sealed",
        "sealed",
        "checked",
        "loaded",
        "signed",
    ]
    (model,) = json.loads(repo("list", "--json").stdout)["models"]
    assert {file["name"]: file["size_bytes"] for file in model["files"]} == {
        name: len(content) for name, content in FILES.items()
    }
    repo("add", exported(zoo.mlp(), {}), "--name", "whole")
    repo("publish-dir", tmp_path / "public")
    pinned = ("trust", "init", "--root", tmp_path / "repo/metadata/1.root.json")
    assert skerry(node.home, *pinned).exit_code == exits.OK
    node.start()
    result = skerry(node.home, "bundle", "import", tmp_path / "public")
    assert result.exit_code == exits.OK, result.stderr
    ready(node, "det")
    expected = answer(node, "whole")
    np.testing.assert_array_equal(answer(node, "det"), expected)
    assert skerry(node.home, "bundle", "export", "det", "-o", tmp_path / "det.tar").exit_code == exits.OK
    with temporary_node() as second:
        assert skerry(second.home, *pinned).exit_code == exits.OK
        second.start()
        assert skerry(second.home, "bundle", "import", tmp_path / "det.tar").exit_code == exits.OK
        ready(second, "det")
        np.testing.assert_array_equal(answer(second, "det"), expected)
        repo("remove", "det", "--revoke")
        repo("publish-dir", tmp_path / "public")
        assert skerry(second.home, "bundle", "import", tmp_path / "public").exit_code == exits.OK
        assert [one["name"] for one in listed(second.home)] == ["whole"]
        ready(second, "whole")
        assert len([path for path in (second.home / "registry/blobs").rglob("*") if path.is_file()]) == 1


def test_a_look_at_all_files_finds_one_beside_a_model_and_the_right_bytes_heal_it(node, exported):
    node.add(zoo.mlp(9), "det")
    node.add(MODEL, "det", files=FILES)
    node.start()
    expected = answer(node, "det")
    digest = node.registry.find("det").files[0].digest
    damage(node.registry.blobs.path(digest))
    status, outcome = node.post("/skerry/v1/registry/scrub")
    assert (status, outcome["files"], outcome["tampered"]) == (200, 4, 1)
    assert tampered(node, "det", 2)["expected"] == digest
    ready(node, "det", 1)
    assert not np.array_equal(answer(node, "det"), expected)
    result = skerry(node.home, "model", "add", exported(), "--name", "det", "--version", 2)
    assert result.exit_code == exits.OK, result.stderr
    ready(node, "det", 2)
    np.testing.assert_array_equal(answer(node, "det"), expected)


def test_models_that_differ_in_a_file_beside_them_alone_never_share_an_answer(node):
    node.configure("models:\n  memory: 1GiB\n")
    node.add(MODEL, "one", files=FILES, cache=EXACT)
    node.add(MODEL, "two", files=OTHER_FILES, cache=EXACT, group="small")
    node.add(MODEL, "three", files=FILES, cache=EXACT, group="small")
    node.add(zoo.mlp(9), "whole")
    node.start()
    for _ in range(2):
        first, second, third = (answer(node, name) for name in ("one", "two", "three"))
        np.testing.assert_array_equal(first, third)
        np.testing.assert_array_equal(second, answer(node, "whole"))
        assert not np.array_equal(first, second)
    assert row(node, "two")["cache_hits"] == 1


def test_once_loaded_the_daemon_holds_no_copy_of_the_files(node):
    node.add(MODEL, "det", files=FILES)
    node.start()
    ready(node, "det")
    held = [str(fd.readlink()) for fd in Path(f"/proc/{node.child.pid}/fd").iterdir()]
    assert [target for target in held if "skerry-model" in target] == []


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_that_is_replaced_gets_the_files_again_and_only_the_signed_ones(node, start):
    node.configure(f"workers:\n  start: {start}\n")
    node.add(zoo.mlp(), "det")
    node.add(MODEL, "det", files=OTHER_FILES)
    entry = node.registry.find("det")
    node.start()
    pid = ready(node, "det", 2)["pid"]
    expected = answer(node, "det")
    os.kill(pid, signal.SIGKILL)
    second = ready(node, "det", 2, instead_of=pid)["pid"]
    np.testing.assert_array_equal(answer(node, "det"), expected)
    damage(node.registry.blobs.path(entry.files[0].digest))
    os.kill(second, signal.SIGKILL)
    assert tampered(node, "det", 2)["expected"] == entry.files[0].digest
    until(lambda: ready(node, "det", 1), "the version before")
    assert not np.array_equal(answer(node, "det"), expected)


def test_a_changed_or_lost_file_keeps_a_model_from_being_loaded_and_harms_no_other(node):
    node.add(zoo.add(1), "well")
    node.add(MODEL, "changed", files=FILES)
    node.add(MODEL, "lost", files=OTHER_FILES)
    changed, lost = (node.registry.find(name).files[1] for name in ("changed", "lost"))
    damage(node.registry.blobs.path(changed.digest))
    node.registry.blobs.discard(lost.digest)
    node.start()
    found = tampered(node, "changed")
    assert (found["expected"], found["by"]) == (changed.digest, "load")
    assert found["found"] not in {"", changed.digest}
    assert Path(found["moved_to"]).name == changed.digest[7:]
    assert ("lost", "1") not in node.table()
    ready(node, "well")
    listed_lost = next(model for model in listed(node.home) if model["name"] == "lost")
    assert listed_lost["installed"] is False
