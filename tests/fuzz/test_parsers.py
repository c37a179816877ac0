"""Parsers of what strangers made: valid input comes back as it was, any other gives a result or a SkerryError."""

import importlib.util
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import msgspec
import mutate
import pytest
import untrusted
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from maker import statement

from agent.cli import manifestfile
from agent.triton import pbtxt
from skerry.errors import SkerryError
from skerry.manifest import Batching, Cache, Limits, Manifest, Sample
from store import oms, tarball, targets
from store.blobs import BlobStore, Content

HERE = Path(__file__).resolve().parent
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
#: The same inputs each time: what is searched at random is searched by fuzz.py.
REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=FIXTURES,
    phases=[Phase.explicit, Phase.generate],  # shrinking a manifest takes minutes; fuzz.py shrinks files
)
FEW = settings(REPEATABLE, max_examples=40)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    return untrusted.parsers(tmp_path_factory.mktemp("parsers"))


def give(parser, data):
    with suppress(SkerryError):
        parser.run(data)


@pytest.mark.parametrize("name", untrusted.NAMES)
class TestAnyInput:
    def test_valid_input_is_accepted(self, parsers, name):
        for data in parsers[name].corpus:
            parsers[name].run(data)

    @given(data=st.binary(max_size=600))
    @FEW
    def test_any_bytes_give_a_result_or_a_refusal(self, parsers, name, data):
        give(parsers[name], data)

    @given(seed=st.integers(0, 2**32))
    @settings(REPEATABLE, max_examples=120)
    def test_damaged_input_gives_a_result_or_a_refusal(self, parsers, name, seed):
        chance, corpus = Random(seed), parsers[name].corpus
        give(parsers[name], mutate.damaged(chance.choice(corpus), chance, corpus))

    @given(place=st.floats(0, 1), which=st.integers(0, 9))
    @FEW
    def test_input_that_is_cut_off_gives_a_result_or_a_refusal(self, parsers, name, place, which):
        corpus = parsers[name].corpus
        data = corpus[which % len(corpus)]
        give(parsers[name], data[: int(place * len(data))])


# -- there and back


TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), max_size=20
)  # PyYAML does not write all controls
NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True)
TENSORS = st.dictionaries(
    TEXT, st.recursive(st.integers(-(2**53), 2**53) | TEXT | st.floats(-1e9, 1e9), st.lists)
)
SAMPLES = st.builds(Sample, TENSORS, st.none() | TENSORS, st.floats(0, 1))
MANIFESTS = st.builds(
    Manifest,
    name=NAMES,
    version=st.integers(1, 2**53 - 1),
    batching=st.builds(Batching, st.integers(0, 4096), st.integers(0, 10_000_000)),
    cache=st.builds(Cache, st.sampled_from(["off", "exact"]), ttl=st.sampled_from([30, "5m", 0.5])),
    limits=st.builds(Limits, st.sampled_from(["512MiB", 2**30]), rate=st.floats(0, 1e6)),
    golden=st.lists(SAMPLES, max_size=2).map(tuple),
    labels=st.dictionaries(TEXT, TEXT, max_size=3),
    classes=st.dictionaries(TEXT, st.lists(TEXT, max_size=3).map(tuple), max_size=2),
    versions=st.sampled_from(["latest", "latest:2", "all", "1,3"]),
    keep_alive=st.sampled_from(["", "10m", 0]),
    pin=st.booleans(),
)


@given(manifest=MANIFESTS)
@REPEATABLE
def test_a_signed_manifest_is_read_as_it_was_written(tmp_path, manifest):
    target = targets.make(Content("sha256:" + "0" * 64, 5), manifest, 1)
    assert targets.read(target.path, target, "models", {}, BlobStore(tmp_path)).manifest == manifest


@given(manifest=MANIFESTS)
@FEW
def test_a_manifest_in_yaml_is_read_as_it_was_written(tmp_path, manifest):
    path = tmp_path / "m.yaml"
    said = msgspec.to_builtins(msgspec.structs.replace(manifest, golden=()))
    path.write_text(yaml.safe_dump(said, allow_unicode=True))
    assert msgspec.to_builtins(manifestfile.read(path)) == said


@given(
    members=st.dictionaries(
        st.from_regex(r"[a-zA-Z0-9/._-]{1,90}", fullmatch=True), st.binary(max_size=1500), max_size=5
    )
)
@REPEATABLE
def test_an_archive_is_read_as_it_was_written(tmp_path, members):
    path = tmp_path / "any.tar"
    path.write_bytes(untrusted.archive_of(members))
    with tarball.Reader(path, lambda _name: 1500) as archive:
        assert {name: archive.read(name) for name in archive.members} == members
        assert list(archive.members) == list(members)


@given(
    files=st.dictionaries(
        st.lists(st.from_regex(r"[^/\x00]{1,20}", fullmatch=True), min_size=1, max_size=3).map("/".join),
        st.binary(min_size=1, max_size=50),
        min_size=1,
        max_size=5,
    ),
    shard=st.none() | st.integers(1, 60),
)
@REPEATABLE
def test_signed_files_are_read_as_they_were_listed(files, shard):
    assume(not any({".", ".."} & set(name.split("/")) for name in files))
    said = oms.statement(json.dumps(statement(files, shard=shard)).encode(), "any")
    assert said.files.keys() == files.keys()
    for name, pieces in said.files.items():
        assert b"".join(files[name][piece.start : piece.stop] for piece in pieces) == files[name]


PBTXT_SCALARS = st.integers(-(2**63), 2**64) | st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
PBTXT = st.recursive(
    PBTXT_SCALARS,
    lambda inner: st.lists(st.tuples(NAMES.map(lambda n: n.replace("-", "_")), inner), max_size=4),
)


def written(value):
    if isinstance(value, list):
        return "{ " + " ".join(f"{name}: {written(each)}" for name, each in value) + " }"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def read(value):
    if isinstance(value, pbtxt.Message):
        return [(field.name, read(field.value)) for field in value.fields]
    return value.value


@given(value=PBTXT)
@REPEATABLE
def test_text_format_is_read_as_it_was_written(value):
    message = pbtxt.parse(f"a: {written(value)}".encode(), "x")
    assert read(message) == [("a", value)]


# -- the most that is accepted


def test_the_largest_inputs_take_bounded_time_and_memory():
    done = subprocess.run([sys.executable, HERE / "bombs.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the tool


def load_fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", HERE / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_campaign_finds_a_bug_and_shrinks_its_input(tmp_path):
    def run(data):
        if b"7" in data and len(data) > 3:
            raise KeyError(data)
        raise SkerryError("refused")

    runs = load_fuzz().Runs(untrusted.Parser("broken", [b'{"a": [1, 2, 3]}'], run), tmp_path, seed=1)
    while not runs.findings:
        runs.one(runs.damaged())
        assert runs.count < 100_000
    ((kind, path),) = runs.findings.items()
    assert kind.startswith("KeyError at test_parsers.py:")
    shrunk = Path(path).read_bytes()
    assert b"7" in shrunk
    assert len(shrunk) == 4


def test_a_campaign_says_how_much_it_did(tmp_path):
    command = [
        sys.executable,
        HERE / "fuzz.py",
        "--seconds",
        "0.5",
        "--engine",
        "own",
        "--out",
        tmp_path,
        "custom",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("custom   own: ")
    assert " runs in " in done.stdout
    wrong = subprocess.run([*command[:-1], "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "expected parsers among tuf, custom" in wrong.stderr
