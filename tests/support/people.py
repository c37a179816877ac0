"""People with keys, the repositories that they keep, and a client of ours that is not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from store_world import Clock

from store import keyfiles, published, roles
from store.keyring import Keyring, identify
from store.repository import Plan, Repository, sign_carried

#: python-tuf's own client reads a directory tree. In a process of its own: store.tuflight stands in for its package.
_CLIENT = """
import json, sys
from pathlib import Path
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

class Tree(FetcherInterface):
    def _fetch(self, url):
        path = Path(url.removeprefix("tree:"))
        if not path.is_file():
            raise DownloadHTTPError("not found", 404)
        yield path.read_bytes()

tree, cache, root, *wanted = sys.argv[1:]
Path(cache, "targets").mkdir(parents=True, exist_ok=True)
bootstrap = Path(root).read_bytes() if root else None
metadata, targets = f"tree:{tree}/metadata/", f"tree:{tree}/targets/"
client = Updater(cache, metadata, cache + "/targets", targets, Tree(), bootstrap=bootstrap)
client.refresh()
found = {}
for path in wanted:
    info = client.get_targetinfo(path)
    found[path] = None if info is None else Path(client.download_target(info)).read_text("latin-1")
print(json.dumps(found))
"""


def fetched(tree, cache, root, *wanted):
    """What python-tuf's Updater finds in a published tree: target path -> text, None where there is no such target."""
    command = [sys.executable, "-c", _CLIENT, str(tree), str(cache), str(root), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def memory_folder():
    """A folder in memory where there is one: hundreds of fsyncs a test are for the disk's tests to wait for."""
    memory = "/dev/shm"  # noqa: S108 - the folder in it is our own
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def nobody(_secret):
    raise AssertionError("asked for a secret")


class Person:
    """Somebody with a key file in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / "key.pem"
        keyfiles.make(self.file)

    @property
    def named(self):
        return identify(str(self.file), nobody)

    @property
    def key(self):
        return self.named.key

    @property
    def id(self):
        return self.key.keyid

    def sign(self, file):
        """Sign a draft that was carried here; returns the copy that goes back."""
        mine = self.folder / Path(file).name
        mine.write_bytes(Path(file).read_bytes())
        keyring = Keyring(None, nobody)
        sign_carried(mine, keyring, [keyring.give(str(self.file))])
        return mine


def holders(*people, threshold=1):
    return roles.Holders(tuple(person.key for person in people), threshold)


class Office:
    """A folder for a repository, people by name, and a clock."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = place / "repo"
        self.clock = Clock()
        self._people = {}

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self.person(name)

    def person(self, name):
        if name not in self._people:
            self._people[name] = Person(self.place / name)
        return self._people[name]

    def open(self, *people):
        """The repository, with these people's keys given for the command."""
        repository = Repository(self.folder, nobody, now=lambda: self.clock.time)
        for person in people:
            repository.keyring.give(str(person.file))
        return repository

    def alone(self, person):
        """A repository in which one person holds every role and is remembered."""
        repository = self.open(person)
        repository.keyring.remember(person.named)
        mine = holders(person)
        assert not repository.init(Plan(mine, mine, mine, mine, mine)).waiting
        return self.open()

    def model(self, text="a model"):
        path = self.place / f"{abs(hash(text))}.onnx"
        path.write_text(text)
        return path

    def out(self):
        """Role -> version of what is published, verified; gone roles left out."""
        found = published.load(self.folder / "metadata")
        if found is None:
            return {}
        versions = {role: document.version for role, document in found.targets.items()}
        return versions | {
            "root": found.root.version,
            "snapshot": found.snapshot.version,
            "timestamp": found.timestamp.version,
        }

    def pending(self):
        return sorted(path.stem for path in (self.folder / "pending").glob("*.json"))

    def later(self, **span):
        self.clock.time += timedelta(**span)
