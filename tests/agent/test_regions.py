"""Names for shared memory: whose it is, what is refused, and that nothing stays behind."""

import os
import stat
from pathlib import Path

import psutil
import pytest

from agent.ipc.regions import MAX_PER_USER, Regions, Registration
from skerry.errors import Denied, InvalidRequest, NotFound, Overloaded
from skerry.terms import TIB

ME = os.geteuid()
OTHER = ME + 1


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(8192))
    return tmp_path


@pytest.fixture
def regions(folder):
    regions = Regions(folder)
    yield regions
    regions.close()


def open_files(folder):
    opened = [Path(file.path) for file in psutil.Process().open_files()]
    return sorted(path.name for path in opened if path.parent == folder)


def test_what_is_registered_is_listed_and_found(regions):
    regions.register(ME, "in", Registration("/one", 4096))
    regions.register(ME, "out", Registration("two", 100, offset=64))
    assert regions.listed(ME, None) == [
        {"name": "in", "key": "/one", "offset": 0, "byte_size": 4096},
        {"name": "out", "key": "two", "offset": 64, "byte_size": 100},
    ]
    assert regions.listed(ME, "out") == regions.listed(ME, None)[1:]
    assert regions.find(ME, "out").region.size_bytes == 164


def test_names_belong_to_their_user(regions):
    regions.register(ME, "in", Registration("/one", 8))
    assert regions.listed(OTHER, None) == []
    with pytest.raises(NotFound):
        regions.find(OTHER, "in")
    regions.unregister(OTHER, "in")
    regions.unregister(OTHER, None)
    assert regions.find(ME, "in").key == "/one"


def test_unregistering_closes_what_was_open(regions, folder):
    regions.register(ME, "a", Registration("/one", 8))
    regions.register(ME, "b", Registration("/one", 8))
    regions.register(ME, "c", Registration("/two", 8))
    assert open_files(folder) == ["one", "one", "two"]
    regions.unregister(ME, "a")
    regions.unregister(ME, "a")
    regions.unregister(ME, "never there")
    assert open_files(folder) == ["one", "two"]
    regions.unregister(ME, None)
    assert open_files(folder) == []
    assert regions.listed(ME, None) == []


@pytest.mark.parametrize(
    ("wanted", "kind", "message"),
    [
        (Registration("/one", 8193), InvalidRequest, "expected at least 8193 bytes, got 8192"),
        (Registration("/one", 8192, offset=1), InvalidRequest, "expected at least 8193 bytes, got 8192"),
        (Registration("/one", 0), InvalidRequest, "a byte_size of 1 or more, got 0 and 0"),
        (Registration("/one", 8, offset=-1), InvalidRequest, "got -1 and 8"),
        (Registration("/one", TIB + 1), InvalidRequest, "expected an offset"),
        (Registration("/three", 8), NotFound, "got none of this name"),
        (Registration("../one", 8), InvalidRequest, "expected a name such as '/input', got '../one'"),
        (Registration("/..", 8), InvalidRequest, "expected a name"),
        (Registration("", 8), InvalidRequest, "expected a name"),
        (Registration("/folder", 8), InvalidRequest, "expected POSIX shared memory"),
        (Registration("/fifo", 8), InvalidRequest, "got another kind of file"),
        (Registration("/link", 8), InvalidRequest, "expected POSIX shared memory"),
    ],
)
def test_what_is_no_shared_memory_is_refused_and_not_kept(regions, folder, wanted, kind, message):
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(folder / "one")
    with pytest.raises(kind, match="shared memory") as caught:
        regions.register(ME, "r", wanted)
    assert message in caught.value.message
    assert regions.listed(ME, None) == []
    assert open_files(folder) == []


def test_a_name_is_taken_until_it_is_given_back(regions):
    regions.register(ME, "r", Registration("/one", 8))
    with pytest.raises(InvalidRequest, match="expected a new name"):
        regions.register(ME, "r", Registration("/two", 8))
    regions.unregister(ME, "r")
    regions.register(ME, "r", Registration("/two", 8))
    assert regions.find(ME, "r").key == "/two"


def test_a_user_cannot_take_all_descriptors(regions, folder):
    for number in range(MAX_PER_USER):
        regions.register(ME, f"r{number}", Registration("/one", 8))
    with pytest.raises(Overloaded, match=f"expected at most {MAX_PER_USER} regions"):
        regions.register(ME, "more", Registration("/one", 8))
    assert len(open_files(folder)) == MAX_PER_USER


@pytest.mark.skipif(ME != 0, reason="needs root, to own files of two users")
def test_the_daemon_is_no_way_to_memory_of_somebody_else(regions, folder):
    os.chown(folder / "one", 1000, 1000)
    (folder / "one").chmod(stat.S_IRWXU)
    with pytest.raises(Denied, match="expected one that belongs to uid 1001, got one of uid 1000"):
        regions.register(1001, "r", Registration("/one", 8))
    with pytest.raises(Denied):
        regions.register(-1, "r", Registration("/one", 8))
    regions.register(1000, "r", Registration("/one", 8))
    regions.register(0, "r", Registration("/one", 8))


def test_memory_that_was_cut_is_noticed_and_its_name_is_free_again(regions, folder):
    regions.register(ME, "r", Registration("/one", 8192))
    region = regions.find(ME, "r").region
    assert not region.has_shrunk()
    os.truncate(folder / "one", 100)
    assert region.has_shrunk()
    region.close()
    with pytest.raises(NotFound):
        regions.find(ME, "r")
    regions.register(ME, "r", Registration("/two", 8))
