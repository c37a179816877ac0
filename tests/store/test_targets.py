"""What signed targets say, when who signed them means harm or is newer than this node."""

import msgspec
import pytest
from tuf.api.metadata import TargetFile
from untrusted import chain_of

from skerry.manifest import Manifest
from store import listing, targets
from store.blobs import BlobStore, Content
from store.listing import Provenance

CONTENT = Content("sha256:" + "0" * 64, 5)
RECORD = Provenance("key", "sha256:0", "sha256:1", 3)
GOOD = targets.make(CONTENT, Manifest(name="good", version=1), 1, RECORD)


def offered(custom, path="models/bad/1.onnx"):
    return TargetFile(5, {"sha256": "0" * 64}, path, {"custom": custom})


@pytest.mark.parametrize(
    "target",
    [
        offered({"manifest": '{"golden":[{"inputs":{"x":' + "[" * 5000 + "]" * 5000 + "}}]}"}),
        offered({"manifest": '{"labels":{"a":"\ud800"}}'}),
        offered({"manifest": "{}", "provenance": msgspec.to_builtins(RECORD) | {"signer": "\ud800"}}),
        offered({"manifest": "{}", "provenance": []}),
        offered({"manifest": "{}", "provenance": msgspec.to_builtins(RECORD) | {"files": 10**400}}),
        offered({"manifest": 1}),
        offered([]),
        offered(None),
        offered({"manifest": "{}"}, "models/\ud800/1.onnx"),
    ],
    ids=["deep", "no UTF-8", "signer", "record", "count", "number", "list", "none", "path"],
)
def test_a_target_that_is_not_understood_costs_no_other_its_place(tmp_path, target):
    both = {GOOD.path: GOOD, target.path: target}
    entries, problems = targets.read_all(chain_of(both), BlobStore(tmp_path))
    assert [(entry.name, entry.provenance) for entry in entries] == [("good", RECORD)]
    assert len(problems) == 1
    told = listing.parse(
        listing.encode(listing.Listing(1, owner=False, entries=tuple(entries), problems=tuple(problems)))
    )
    assert told.entries == tuple(entries)
    assert "signed, but not understood" in told.problems[0]


def test_a_target_says_what_was_put_into_it(tmp_path):
    manifest = Manifest(name="m", version=7, labels={"é": "ü"}, keep_alive="5m")
    target = targets.make(CONTENT, manifest, 5)
    entry = targets.read(target.path, target, "models", {}, BlobStore(tmp_path))
    assert (entry.name, entry.version, entry.digest, entry.manifest) == ("m", 7, CONTENT.digest, manifest)
    assert (entry.release, entry.role) == (5, "models")
    assert entry.provenance is None
