"""What may be on a disk after the power was cut, given what was done to it.

Does: replay recorded operations (syscalls) on a model of a file system, and say after any number of them which
trees a cut may leave.
Leaves out: recording, and what the trees are good for.

Rules
 * What was synced is there, and nothing else is promised: data of a file by a sync of that file, a name by a
   sync of its directory.
 * Data that was not synced is lost, kept, torn between sectors, or zeros, each write for itself.
 * Names that were not synced, in order: as a journal keeps them (ext4), any prefix of the changes; a sync of
   whatever changed carries all before it along. Loose: each name for itself is any of what it was since
   its directory was synced, as POSIX allows, so a rename may leave both names or none.
 * The same seed gives the same trees.

Each cut first comes in KINDS, four of which are extremes, and then at random. Source for the journal:
https://docs.kernel.org/filesystems/ext4/journal.html; for what POSIX leaves open: the ALICE paper (OSDI 2014).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from syscalls import Create, Link, MakeDir, Rename, Say, Sync, Tree, Truncate, Unlink, Write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from syscalls import Operation

SECTOR_BYTES = 512  # what a disk writes whole


@dataclass(eq=False, slots=True)
class File:
    """`synced` is safe; `pending` are the changes since, which a cut may take."""

    synced: bytes = b""
    content: bytes = b""
    pending: list[Write | Truncate] = field(default_factory=list)

    def apply(self, change: Write | Truncate) -> None:
        self.pending.append(change)
        self.content = _changed(self.content, change)

    def sync(self) -> None:
        self.synced = self.content
        self.pending = []


@dataclass(eq=False, slots=True)
class Directory:
    """`was`: each name that changed since the last sync -> what it has stood for since, oldest first."""

    entries: dict[str, Node] = field(default_factory=dict)
    was: dict[str, list[Node | None]] = field(default_factory=dict)


Node = File | Directory

#: One change of a name: where, which, what it stands for now, what it stood for before.
_NameChange = tuple[Directory, str, Node | None]

_Choice = tuple[str, str]
#: What becomes of (names, data) that were not synced, for the first cuts of each place; then random ones.
KINDS: tuple[_Choice, ...] = (
    ("kept", "lost"),
    ("loose", "random"),
    ("lost", "lost"),
    ("kept", "kept"),
    ("lost", "kept"),
    ("journal", "random"),
)
_RANDOM = tuple(kind for kind in KINDS if kind[1] == "random")


class Disk:
    """A file system in memory, everything of `tree` safely on it."""

    def __init__(self, tree: Tree) -> None:
        self.root = Directory()
        for path, data in sorted(tree.items()):
            parent, name = self._parent(path)
            parent.entries[name] = Directory() if data is None else File(data, data)
        #: Changes of names, each a group that a journal keeps or loses together (a rename is two).
        self._journal: list[list[_NameChange]] = []
        self._committed = 0  # of these, how many surely reached the disk
        self._touched: dict[int, int] = {}  # id of a node -> length of the journal when it last changed
        self._base = _frozen(self.root)

    # -- what happens

    def apply(self, operation: Operation) -> None:
        match operation:
            case Create(path) | MakeDir(path):
                node = File() if isinstance(operation, Create) else Directory()
                self._rename_in((*self._parent(path), node))
                self._touch(node)
            case Write(path) | Truncate(path):
                file = self._file(path)
                size = len(file.content)
                file.apply(operation)
                if len(file.content) != size:
                    self._touch(file)
            case Sync(path):
                self._sync(self._node(path))
            case Rename(path, to):
                moved = self._node(path)
                self._rename_in((*self._parent(to), moved), (*self._parent(path), None))
                self._touch(moved)
            case Link(path, to):
                self._rename_in((*self._parent(to), self._node(path)))
            case Unlink(path):
                self._rename_in((*self._parent(path), None))
            case Say():
                pass

    def _rename_in(self, *changes: _NameChange) -> None:
        for directory, name, node in changes:
            directory.was.setdefault(name, [directory.entries.get(name)]).append(node)
            if node is None:
                del directory.entries[name]
            else:
                directory.entries[name] = node
        self._journal.append(list(changes))
        for directory, _, _ in changes:
            self._touch(directory)

    def _touch(self, node: Node) -> None:
        self._touched[id(node)] = len(self._journal)

    def _sync(self, node: Node) -> None:
        if isinstance(node, Directory):
            node.was = {}
        else:
            node.sync()
        self._committed = max(self._committed, self._touched.get(id(node), 0))

    # -- what is there

    def now(self) -> Tree:
        """What a process sees."""
        return _listed(self.root, lambda directory: directory.entries, lambda file: file.content)

    def after_cut(self, names: str, data: str, chance: random.Random) -> Tree:
        """One tree that a cut may leave; `names` and `data` as in KINDS."""

        def content(file: File) -> bytes:
            return _survivor(file, data, chance)

        if names == "loose":
            return _listed(self.root, lambda directory: _loose(directory, chance), content)
        count = {"lost": self._committed, "kept": len(self._journal)}.get(names)
        if count is None:
            count = chance.randint(self._committed, len(self._journal))
        entries = {key: dict(value) for key, value in self._base.items()}
        for group in self._journal[:count]:
            for directory, name, node in group:
                entries.setdefault(id(directory), {})[name] = node
        return _listed(self.root, lambda directory: entries.get(id(directory), {}), content)

    def _node(self, path: str) -> Node:
        node: Node = self.root
        for name in path.split("/") if path else []:
            assert isinstance(node, Directory)
            node = node.entries[name]
        return node

    def _file(self, path: str) -> File:
        node = self._node(path)
        assert isinstance(node, File)
        return node

    def _parent(self, path: str) -> tuple[Directory, str]:
        folder, _, name = path.rpartition("/")
        parent = self._node(folder)
        assert isinstance(parent, Directory)
        return parent, name


def replays(before: Tree, operations: Sequence[Operation], after: Tree) -> bool:
    """Whether the operations lead from one tree to the other, so that none was missed."""
    disk = Disk(before)
    for operation in operations:
        disk.apply(operation)
    return _without_mapped(disk.now()) == _without_mapped(after)


@dataclass(frozen=True, slots=True)
class Image:
    """A tree that a cut after `done` operations may leave; `kind` counts those of one place."""

    done: int
    kind: int
    tree: Tree = field(repr=False)


def images(before: Tree, operations: Sequence[Operation], seed: int, per_cut: int) -> Iterator[Image]:
    """For every number of operations done, `per_cut` trees; equal ones only once between two things that are said.

    A tree can be had again by its `done`, its `kind` and the seed.
    """
    disk = Disk(before)
    seen: set[int] = set()
    for done in range(len(operations) + 1):
        if done:
            disk.apply(operations[done - 1])
            if isinstance(operations[done - 1], Say):
                seen.clear()  # what was harmless before may be a broken word now
        for kind in range(per_cut):
            names, data = KINDS[kind] if kind < len(KINDS) else _RANDOM[kind % 2]
            tree = _without_mapped(disk.after_cut(names, data, random.Random(f"{seed} {done} {kind}")))
            mark = hash(frozenset(tree.items()))
            if mark not in seen:
                seen.add(mark)
                yield Image(done, kind, tree)


def _frozen(directory: Directory) -> dict[int, dict[str, Node | None]]:
    found: dict[int, dict[str, Node | None]] = {id(directory): dict(directory.entries)}
    for node in directory.entries.values():
        if isinstance(node, Directory):
            found |= _frozen(node)
    return found


def _listed(
    root: Directory,
    entries: Callable[[Directory], dict[str, Node | None]] | Callable[[Directory], dict[str, Node]],
    content: Callable[[File], bytes],
) -> Tree:
    """The tree of these entries; a file with two names has the same content under both."""
    tree: Tree = {}
    contents: dict[int, bytes] = {}

    def walk(directory: Directory, prefix: str) -> None:
        for name, node in entries(directory).items():
            if isinstance(node, Directory):
                tree[prefix + name] = None
                walk(node, f"{prefix}{name}/")
            elif node is not None:
                if id(node) not in contents:
                    contents[id(node)] = content(node)
                tree[prefix + name] = contents[id(node)]

    walk(root, "")
    return tree


def _loose(directory: Directory, chance: random.Random) -> dict[str, Node | None]:
    chosen: dict[str, Node | None] = dict(directory.entries)
    for name, was in directory.was.items():
        chosen[name] = chance.choice(was)
    return chosen


def _survivor(file: File, data: str, chance: random.Random) -> bytes:
    if data == "kept" or not file.pending:
        return file.content
    if data == "lost":
        return file.synced
    content = file.synced
    for change in file.pending:
        content = _changed(content, _torn(change, chance))
    # A length that was written down before the data that it stands for leaves zeros.
    longer = len(file.content) - len(content)
    return content + bytes(longer) if longer > 0 and chance.random() < 0.5 else content


def _torn(change: Write | Truncate, chance: random.Random) -> Write | Truncate | None:
    fate = chance.choice(("lost", "kept", "torn", "sectors"))
    if fate == "lost":
        return None
    if fate == "kept" or isinstance(change, Truncate):
        return change
    ends = [
        *range(SECTOR_BYTES - change.offset % SECTOR_BYTES, len(change.data), SECTOR_BYTES),
        len(change.data),
    ]
    if fate == "torn":
        return Write(change.path, change.offset, change.data[: chance.choice([0, *ends])])
    data = bytearray(change.data)
    start = 0
    for end in ends:
        if chance.random() < 0.5:
            data[start:end] = bytes(end - start)
        start = end
    return Write(change.path, change.offset, bytes(data))


def _changed(content: bytes, change: Write | Truncate | None) -> bytes:
    if change is None or (isinstance(change, Write) and not change.data):
        return content
    if isinstance(change, Truncate):
        return content[: change.size].ljust(change.size, b"\0")
    end = change.offset + len(change.data)
    return content[: change.offset].ljust(change.offset, b"\0") + change.data + content[end:]


def _without_mapped(tree: Tree) -> Tree:
    """SQLite writes the -shm through a mapping, and makes it anew when nobody else has the file open."""
    return {path: data for path, data in tree.items() if not path.endswith("-shm")}
