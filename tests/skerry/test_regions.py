"""Shared memory that a client lends: who holds it, who may open it, and that nothing stays behind."""

import gc
import os
import signal
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from skerry import regions as lending
from skerry.regions import LEAST_REGION_BYTES, PREFIX, SHM, Regions, sweep

pytestmark = pytest.mark.skipif(
    not SHM.is_dir(), reason="no /dev/shm: POSIX shared memory lies elsewhere here"
)


@pytest.fixture
def regions():
    made = Regions(lambda: None)
    yield made
    made.close()


def files_of(regions):
    return {path.name for path in regions._paths.values() if path.exists()}


def test_a_region_is_lent_again_only_when_the_last_array_in_it_is_gone(regions):
    first = np.asarray(regions.take(1000))
    part = first[100:200].view(np.float32)
    name = regions.find(part)[0].name
    assert regions.find(part)[1] == 100
    del first
    second = np.asarray(regions.take(1000))
    assert regions.find(second)[0].name != name
    part[:] = 7
    assert not second.any()
    del part
    third = np.asarray(regions.take(1000))
    assert regions.find(third)[0].name == name


def test_a_retired_region_is_never_lent_again_and_the_daemon_is_told_once(regions):
    lease = regions.take(1000)
    lease.region.registered = lease.region.retired = True
    name = lease.region.name
    assert regions.dropped() == []
    del lease
    assert regions.dropped() == [name]
    assert regions.dropped() == []
    assert not (SHM / name).exists()


def test_memory_and_regions_have_ceilings(regions, monkeypatch):
    monkeypatch.setattr(lending, "MAX_REGIONS", 2)
    leases = [regions.take(1), regions.take(1)]
    assert regions.take(1) is None
    del leases[0]
    assert regions.take(LEAST_REGION_BYTES * 8) is not None  # the free small one made room
    monkeypatch.setattr(lending, "MAX_SHARED_BYTES", LEAST_REGION_BYTES)
    assert regions.take(1) is None


def test_a_full_dev_shm_is_no_room_instead_of_a_crash(regions, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    made = []
    create = lending._create
    monkeypatch.setattr(lending, "_create", lambda: made.append(create()) or made[-1])
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert regions.take(1000) is None
    assert len(made) == 1
    assert not made[0][1].exists()


def test_only_its_user_and_the_daemons_may_open_a_region():
    private, lent = Regions(lambda: None), Regions(lambda: os.geteuid() + 1)
    for regions in (private, lent):
        lease = regions.take(1)
        assert stat.S_IMODE(lease.region.path.stat().st_mode) & 0o007 == 0
        attributes = os.listxattr(lease.region.path)
        if regions is private:
            assert "system.posix_acl_access" not in attributes
        elif not attributes:
            pytest.skip("this kernel's tmpfs has no access control lists")
        else:
            acl = os.getxattr(lease.region.path, "system.posix_acl_access")
            assert (os.geteuid() + 1).to_bytes(4, "little") in acl
        del lease
        regions.close()


def test_arrays_outlive_a_close_and_files_do_not(regions):
    array = np.asarray(regions.take(1000))
    assert files_of(regions)
    path = next(iter(regions._paths.values()))
    regions.close()
    assert not path.exists()
    array[:] = 3
    assert array.sum() >= 3000
    assert regions.find(array) is None
    del array
    assert regions.take(1000) is not None


def test_a_forgotten_client_leaves_nothing(regions):
    dropped = Regions(lambda: None)
    lease = dropped.take(1)
    path = lease.region.path
    del dropped, lease
    gc.collect()
    assert not path.exists()


def child(code, **options):
    prelude = "import os, sys, numpy as np; from skerry.regions import Regions; r = Regions(lambda: None)\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_a_program_that_ends_without_closing_leaves_nothing_and_says_nothing():
    done = child("a = np.asarray(r.take(1)); print(r.find(a)[0].path)")
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(done.stdout.strip())  # noqa: PTH110 - a line of output, not a path of ours


def test_what_a_killed_program_left_is_swept_and_what_a_living_one_holds_is_not(regions):
    lease = regions.take(1)
    done = child(
        f"a = r.take(1); print(a.region.name, flush=True); os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    left = SHM / done.stdout.strip()
    assert left.name.startswith(PREFIX)
    assert left.exists()
    sweep()
    assert not left.exists()
    assert lease.region.path.exists()


def test_a_forked_child_leaves_its_parents_regions_alone():
    done = child(
        """
        a = np.asarray(r.take(1)); a[:] = 5
        path = r.find(a)[0].path
        pid = os.fork()
        if pid == 0:
            assert r.find(a) is None
            b = np.asarray(r.take(1)); assert not b[:100].any()
            mine = r.find(b)[0].path
            print(mine, flush=True)
            del a, b
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert path.exists() and a[0] == 5 and r.find(a)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(done.stdout.strip())  # noqa: PTH110 - a line of output, not a path of ours
