"""Bundles dropped into a real directory, under a real inotify; and the file that reloads."""

import asyncio
import errno
import os
import threading
from contextlib import asynccontextmanager

import pytest

from skerry.errors import StorageFailed, Unavailable, Untrusted
from sync import inbox as inbox_module
from sync import watch
from sync.inbox import REJECTED, Inbox

SETTLE_S = 0.05


class Importer:
    """Stands for the registry: keeps what it was given, and raises what it was told to."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.errors: dict[str, Exception] = {}
        self.changed = asyncio.Event()

    async def __call__(self, path):
        self.taken.append((path.name, path.read_bytes()))
        self.changed.set()
        if path.name in self.errors:
            raise self.errors[path.name]

    async def wait_for(self, count: int) -> None:
        while len(self.taken) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a directory sets no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(directory, importer, settle_s=SETTLE_S):
    watcher = watch.Watcher(asyncio.get_running_loop())
    inbox = Inbox(directory, importer, watcher, settle_s)
    inbox.start()
    try:
        yield inbox
    finally:
        watcher.close()
        await inbox.close()


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def box(tmp_path):
    directory = tmp_path / "inbox"
    directory.mkdir()
    return directory


def test_written_moved_and_linked_bundles_are_imported_and_removed(box, tmp_path):
    async def main():
        importer = Importer()
        async with running(box, importer):
            (box / "written.tar").write_bytes(b"one")
            (tmp_path / "elsewhere").write_bytes(b"two")
            (tmp_path / "elsewhere").rename(box / "moved.tar")
            (box / "inside.part").write_bytes(b"three")
            (box / "inside.part").rename(box / "inside.tar")
            (tmp_path / "linked").write_bytes(b"four")
            os.link(tmp_path / "linked", box / "linked.tar")
            await importer.wait_for(4)
            await until(lambda: names(box) == [])
        return importer.taken

    expected = [
        ("inside.tar", b"three"),
        ("linked.tar", b"four"),
        ("moved.tar", b"two"),
        ("written.tar", b"one"),
    ]
    assert sorted(asyncio.run(main())) == expected


def test_writers_that_close_or_move_are_not_made_to_wait(box, tmp_path):
    async def main():
        importer = Importer()
        async with running(box, importer, settle_s=3600):
            (box / "written.tar").write_bytes(b"one")
            (tmp_path / "elsewhere").write_bytes(b"two")
            (tmp_path / "elsewhere").rename(box / "moved.tar")
            await importer.wait_for(2)
        return sorted(name for name, _ in importer.taken)

    assert asyncio.run(main()) == ["moved.tar", "written.tar"]


def test_bundles_that_were_there_at_start_are_imported_once_each(box):
    (box / "b.tar").write_bytes(b"b")
    (box / "a.tar").write_bytes(b"a")

    async def main():
        importer = Importer()
        async with running(box, importer):
            await importer.wait_for(2)
            await until(lambda: names(box) == [])
        return importer.taken

    assert sorted(asyncio.run(main())) == [("a.tar", b"a"), ("b.tar", b"b")]


def test_open_file_is_left_alone_until_its_writer_closes_it(box):
    """With a settle time that never ends, only the close can be what hands it over."""

    async def main():
        importer = Importer()
        async with running(box, importer, settle_s=3600):
            with (box / "slow.tar").open("wb", buffering=0) as file:
                file.write(b"first ")
                (box / "other.tar").write_bytes(b"x")
                await importer.wait_for(1)
                assert importer.taken == [("other.tar", b"x")]
                file.write(b"second")
            await importer.wait_for(2)
            await until(lambda: names(box) == [])
        return importer.taken[1]

    assert asyncio.run(main()) == ("slow.tar", b"first second")


def test_refused_bundle_is_set_aside_with_its_reason_and_the_next_one_is_imported(box):
    async def main():
        importer = Importer()
        importer.errors["bad.tar"] = Untrusted(
            "bad.tar: expected sha256:aa, got sha256:bb", "export it again"
        )
        async with running(box, importer):
            (box / "bad.tar").write_bytes(b"bad")
            (box / "good.tar").write_bytes(b"good")
            await importer.wait_for(2)
            await until(lambda: names(box) == [REJECTED])

    asyncio.run(main())
    assert names(box / REJECTED) == ["bad.tar", "bad.tar.reason.txt"]
    reason = (box / REJECTED / "bad.tar.reason.txt").read_text()
    assert reason == "bad.tar: expected sha256:aa, got sha256:bb\nhint: export it again\n"


def test_reason_is_written_beside_the_bundle_even_where_a_link_of_its_name_leads_away(box, tmp_path):
    precious = tmp_path / "owner.pem"
    precious.write_text("key")
    (box / REJECTED).mkdir()
    (box / REJECTED / "bad.tar.reason.txt").symlink_to(precious)

    async def main():
        importer = Importer()
        importer.errors["bad.tar"] = Untrusted("not signed")
        async with running(box, importer):
            (box / "bad.tar").write_bytes(b"bad")
            await until(lambda: names(box) == [REJECTED])

    asyncio.run(main())
    assert precious.read_text() == "key"
    assert (box / REJECTED / "bad.tar.reason.txt").read_text() == "not signed\n"


def test_bundle_whose_name_is_not_utf8_is_refused_and_the_next_one_is_imported(box):
    name = os.fsdecode(b"\xff.tar")

    async def main():
        importer = Importer()
        importer.errors[name] = Untrusted(f"{name}: not signed")
        async with running(box, importer):
            (box / name).write_bytes(b"bad")
            (box / "good.tar").write_bytes(b"good")
            await until(lambda: names(box) == [REJECTED])

    asyncio.run(main())
    assert (box / REJECTED / f"{name}.reason.txt").read_text() == "\\udcff.tar: not signed\n"


def test_bug_in_the_import_refuses_the_bundle_and_tells_the_log(box, caplog):
    async def main():
        importer = Importer()
        importer.errors["odd.tar"] = ZeroDivisionError("secret detail")
        async with running(box, importer):
            (box / "odd.tar").write_bytes(b"odd")
            await until(lambda: names(box) == [REJECTED])

    asyncio.run(main())
    reason = (box / REJECTED / "odd.tar.reason.txt").read_text()
    assert reason == "the import failed with ZeroDivisionError; the log has the rest\n"
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("fault", [StorageFailed("disk full"), Unavailable("the registry is locked")])
def test_fault_of_this_node_keeps_the_bundle_and_a_touch_or_a_start_tries_again(box, fault):
    async def main():
        importer = Importer()
        importer.errors["a.tar"] = fault
        async with running(box, importer):
            (box / "a.tar").write_bytes(b"a")
            await importer.wait_for(1)
            (box / "b.tar").write_bytes(b"b")  # the scan that follows b must not bring a round again
            await importer.wait_for(2)
            await until(lambda: names(box) == ["a.tar"])
            await asyncio.sleep(3 * SETTLE_S)
            assert len(importer.taken) == 2
            (box / "a.tar").write_bytes(b"a again")
            await importer.wait_for(3)
        importer.errors.clear()
        async with running(box, importer):
            await importer.wait_for(4)
            await until(lambda: names(box) == [])
        return [name for name, _ in importer.taken]

    assert asyncio.run(main()) == ["a.tar", "b.tar", "a.tar", "a.tar"]


def test_file_that_changes_while_it_is_handled_is_handled_again_not_judged(box):
    async def main():
        importer = Importer()

        async def handle(path):
            await importer(path)
            if len(importer.taken) == 1:
                path.write_bytes(b"complete")
                raise Untrusted("half a bundle")

        async with running(box, handle):
            (box / "a.tar").write_bytes(b"half")
            await importer.wait_for(2)
            await until(lambda: names(box) == [])
        return importer.taken

    assert asyncio.run(main()) == [("a.tar", b"half"), ("a.tar", b"complete")]


def test_other_names_links_and_directories_are_ignored(box, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")

    async def main():
        importer = Importer()
        async with running(box, importer):
            (box / "notes.txt").write_bytes(b"")
            (box / ".upload.tar").write_bytes(b"")
            (box / "link.tar").symlink_to(tmp_path / "secret")
            (box / "dir.tar").mkdir()
            (box / "last.tar").write_bytes(b"last")
            await importer.wait_for(1)
            await asyncio.sleep(3 * SETTLE_S)
        return importer.taken

    assert asyncio.run(main()) == [("last.tar", b"last")]
    assert names(box) == [".upload.tar", "dir.tar", "link.tar", "notes.txt"]


def test_bundles_over_the_ceiling_wait_on_disk_and_are_imported_after_the_others(box, monkeypatch):
    monkeypatch.setattr(inbox_module, "MAX_WAITING", 2)
    for number in range(5):
        (box / f"{number}.tar").write_bytes(b"")

    async def main():
        importer = Importer()
        async with running(box, importer):
            await importer.wait_for(5)
            await until(lambda: names(box) == [])
        return sorted(name for name, _ in importer.taken)

    assert asyncio.run(main()) == [f"{number}.tar" for number in range(5)]


def test_only_the_newest_refusals_are_kept(box, monkeypatch):
    monkeypatch.setattr(inbox_module, "MAX_REJECTED", 2)
    (box / REJECTED).mkdir()
    (box / REJECTED / "mine.txt").write_text("an operator's note")

    async def main():
        importer = Importer()
        importer.errors = {f"{number}.tar": Untrusted("no") for number in range(4)}
        async with running(box, importer):
            for number in range(4):
                (box / f"{number}.tar").write_bytes(b"")
                await until(lambda: names(box) == [REJECTED])

    asyncio.run(main())
    kept = ["2.tar", "2.tar.reason.txt", "3.tar", "3.tar.reason.txt", "mine.txt"]
    assert names(box / REJECTED) == kept


def test_close_waits_for_the_bundle_in_hand_and_takes_no_other(box):
    async def main():
        importer, gate = Importer(), asyncio.Event()

        async def handle(path):
            await importer(path)
            await gate.wait()

        async with running(box, handle) as inbox:
            (box / "a.tar").write_bytes(b"a")
            await importer.wait_for(1)
            (box / "b.tar").write_bytes(b"b")
            closing = asyncio.ensure_future(inbox.close())
            await asyncio.sleep(0)
            assert not closing.done()
            gate.set()
            await closing
            inbox._changed(watch.Change("b.tar", complete=True))  # it was on its way
            await asyncio.sleep(0)
        return importer.taken

    assert asyncio.run(main()) == [("a.tar", b"a")]
    assert names(box) == ["b.tar"]


def test_nothing_runs_while_nothing_happens(box):
    async def main():
        loop = asyncio.get_running_loop()
        async with running(box, Importer()):
            await asyncio.sleep(0.05)
            assert [handle for handle in loop._scheduled if not handle.cancelled()] == []
            assert len(asyncio.all_tasks()) == 1

    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == before


def test_directory_that_is_missing_is_an_error(tmp_path):
    async def main():
        watcher = watch.Watcher(asyncio.get_running_loop())
        with pytest.raises(
            StorageFailed, match="no: expected a directory that can be watched, got No such file"
        ):
            watcher.watch(tmp_path / "no", lambda _change: None)
        watcher.close()

    asyncio.run(main())


def test_system_limit_of_watches_is_named_with_the_way_out(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, "inotify instance limit reached")

    monkeypatch.setattr(watch, "_observer", refuse)

    async def main():
        with pytest.raises(StorageFailed, match=r"hint: raise the sysctl fs\.inotify\.max_user_instances"):
            watch.Watcher(asyncio.get_running_loop()).watch(tmp_path, lambda _change: None)

    asyncio.run(main())


def test_configuration_file_is_noticed_however_it_is_replaced(tmp_path):
    path = tmp_path / "skerry.yaml"

    async def main():
        seen = []
        watcher = watch.Watcher(asyncio.get_running_loop())
        watch.watch_file(
            watcher, path, lambda: seen.append(path.read_text() if path.exists() else None), quiet_s=0.02
        )
        try:
            steps = [
                lambda: path.write_text("created"),
                lambda: path.write_text("rewritten"),
                lambda: (tmp_path / "new").write_text("renamed") and (tmp_path / "new").rename(path),
                path.unlink,
            ]
            for count, step in enumerate(steps, 1):
                step()
                await until(lambda count=count: len(seen) == count)
        finally:
            watcher.close()
        return seen

    assert asyncio.run(main()) == ["created", "rewritten", "renamed", None]


def test_swapped_directory_link_beside_the_file_is_noticed(tmp_path):
    """Kubernetes replaces a ConfigMap by swapping the link ..data."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "skerry.yaml").write_text(name)
    (tmp_path / "..data").symlink_to("one")
    path = tmp_path / "skerry.yaml"
    path.symlink_to("..data/skerry.yaml")

    async def main():
        seen = asyncio.Event()
        watcher = watch.Watcher(asyncio.get_running_loop())
        watch.watch_file(watcher, path, seen.set, quiet_s=0.02)
        try:
            (tmp_path / "..tmp").symlink_to("two")
            (tmp_path / "..tmp").rename(tmp_path / "..data")
            await asyncio.wait_for(seen.wait(), 10)
        finally:
            watcher.close()

    asyncio.run(main())
    assert path.read_text() == "two"


def test_other_files_and_reads_do_not_reload(tmp_path):
    path = tmp_path / "skerry.yaml"
    path.write_text("a")

    async def main():
        seen = []
        watcher = watch.Watcher(asyncio.get_running_loop())
        watch.watch_file(watcher, path, lambda: seen.append(1), quiet_s=0.02)
        try:
            path.read_text()
            (tmp_path / "state.db").write_text("x")
            await asyncio.sleep(0.15)
        finally:
            watcher.close()
        return seen

    assert asyncio.run(main()) == []
