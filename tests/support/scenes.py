"""Changes of a registry that a cut, a fault or a kill may meet: what was before, what is after, what comes next.

Does: make a home and the command that changes it; look at a home; say what is wrong with it afterwards.
Leaves out: the cuts, faults and kills.

Rules
 * Everything goes through the command line, so that what is looked at is what people rely on.
 * A home is old or new and never between; the next change succeeds and leaves nothing that a home without the
   accident would not have; metadata older than what is there is refused before and after.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import syscalls
import zoo
from carrier import ROLES, Carrier
from typer.testing import CliRunner

from agent.cli import exits
from agent.cli.app import app
from agent.paths import resolve
from store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from store.ledger import Standing

TWO = zoo.mlp(2)  # spans many sectors
ADD, IMPORT = ("model", "add"), ("bundle", "import")


class State(NamedTuple):
    """What a registry says of itself: the revision, and (name, version, digest) of its models."""

    revision: int
    models: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """One change, ready to be made again and again on copies of `before`.

    `said` is in what the command prints once it is done, `clean` are the files then. `follow_up` is the change
    after it, which succeeds on the old home and on the new; `stale` is an import that both must refuse.
    """

    name: str
    before: syscalls.Tree
    change: tuple[str, ...]
    said: str
    follow_up: tuple[str, ...]
    stale: tuple[str, ...]
    old: State
    new: State
    clean: list[str]
    floors: tuple[Standing, Standing]  # of old and new
    #: state before the follow-up -> (state, names of files) after it, where nothing went wrong
    expected: dict[State, tuple[State, list[str]]]

    @property
    def before_files(self) -> list[str]:
        """The registry's files before the change, as `files` says them."""
        names = (name for name, data in self.before.items() if data is not None)
        return sorted(name.removeprefix("registry/") for name in names if name.startswith("registry/"))

    def command(self, home: Path) -> list[str]:
        return command(home, *self.change)


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: what is tested is the order of calls, not the disk under them."""
    memory = Path("/dev/shm")  # noqa: S108 - the name below it is mkdtemp's
    folder = Path(tempfile.mkdtemp(prefix="sk-", dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(home: Path, *arguments: str) -> list[str]:
    """The command line as a process of its own."""
    return [sys.executable, "-m", "agent.cli", "--home", str(home), *arguments]


def skerry(home: Path, *arguments: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr. What it does not report itself is a fault."""
    result = CliRunner().invoke(app, ["--home", str(home), *arguments], prog_name="skerry")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{' '.join(arguments)}: {result.exception!r}") from result.exception
    return result.exit_code, result.stdout, result.stderr


def done(home: Path, *arguments: str) -> str:
    """The stdout of a command that must succeed."""
    code, out, err = skerry(home, *arguments)
    assert code == exits.OK, f"{' '.join(arguments)}: exit code {code}: {err}"
    return out


def look(home: Path) -> State:
    """What the registry holds; it must verify, and every listed blob must be there and hash right."""
    page = json.loads(done(home, "model", "verify", "--json"))
    assert page["problems"] == []
    models = tuple((row["name"], row["version"], row["digest"]) for row in page["models"])
    assert all(row["problem"] is None for row in page["models"])
    return State(page["revision"], models)


def standing(home: Path) -> Standing:
    """What may never fall: versions of roles, releases of models, and the time."""
    return Ledger(resolve(str(home), {}, os.geteuid()).state_db).read()


def fallen(before: Standing, after: Standing) -> list[str]:
    """What is lower than it was. A role's floor may begin anew under new keys, which only a new root can bring."""
    roots = [it.floors["root"].version if "root" in it.floors else 0 for it in (before, after)]
    fell = ["root"] if roots[1] < roots[0] else []
    for role, floor in before.floors.items():
        now = after.floors.get(role)
        if now is None or (now.version < floor.version if now.keys == floor.keys else roots[1] <= roots[0]):
            fell.append(f"{role}: {floor} became {now}")
    releases = before.releases.items()
    fell += [f"release of {name}" for name, low in releases if after.releases.get(name, 0) < low]
    return (
        fell
        + ["time"] * (after.time_floor < before.time_floor)
        + ["pin"] * (before.pinned not in {"", after.pinned})
    )


def files(home: Path) -> list[str]:
    """The names of all files of the registry."""
    folder = home / "registry"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fault_of(scene: Scene, home: Path, *, must_be_new: bool = False, go_on: bool = True) -> str:
    """What is wrong with a home on which the change of `scene` met an accident; empty if nothing is.

    With `go_on` it is also offered older metadata, and changed further.
    """
    try:
        _judge(scene, home, must_be_new=must_be_new)
        if go_on:
            _go_on(scene, home)
    except AssertionError as error:
        return str(error) or repr(error)
    return ""


def _judge(scene: Scene, home: Path, *, must_be_new: bool) -> None:
    found = look(home)
    assert found in {scene.old, scene.new}, f"neither old nor new: {found}"
    fell = fallen(scene.floors[0], standing(home))
    assert not fell, f"these fell: {fell}"
    if (
        found == scene.new and scene.old.revision
    ):  # else the key, and all that hangs on it, was made in this run
        fell = fallen(scene.floors[1], standing(home))
        assert not fell, f"the new state lacks what it must remember: {fell}"
    assert not must_be_new or found == scene.new, (
        "the command had said that it was done, and the home is the old one"
    )


def _go_on(scene: Scene, home: Path) -> None:
    found = look(home)
    if scene.stale:
        code, _, err = skerry(home, *scene.stale)
        assert code == exits.UNTRUSTED, (
            f"older metadata: expected exit code {exits.UNTRUSTED}, got {code}: {err}"
        )
        assert look(home) == found, "older metadata was refused and changed the home"
    done(home, *scene.follow_up)
    after, names = scene.expected[found]
    assert look(home) == after, f"after the next change: expected {after}, got {look(home)}"
    odd = sorted(set(names) ^ set(files(home)))
    assert not odd, f"after the next change: too many or too few of {odd}"


def an_add(place: Path, two: bytes = TWO) -> Scene:
    """Version 2 of a model beside version 1, on the node that signs."""
    home = place / "home"
    first, second, other = _models(place, two)
    for file, name in ((first, "det"), (other, "kws")):
        done(home, *ADD, str(file), "--name", name)
    change = (*ADD, str(second), "--name", "det", "--version", "2")
    return _scene("add", place, change, "signed ", ("model", "remove", "kws"))


def a_first_add(place: Path) -> Scene:
    """The first model of all: the key and the root are made on the way."""
    one, _, other = _models(place, TWO)
    (place / "home").mkdir()
    change, follow_up = ((*ADD, str(file), "--name", file.stem) for file in (one, other))
    return _scene("first add", place, change, "signed ", follow_up)


def an_import(place: Path, two: bytes = TWO) -> Scene:
    """The third bundle of a publisher, on a node that follows and has the second."""
    return _followed("import", place, two)


def a_rotation(place: Path, two: bytes = TWO) -> Scene:
    """The same, and the third bundle brings a root with new keys for all roles."""
    return _followed("rotation", place, two, *ROLES)


ALL: dict[str, Callable[..., Scene]] = {"add": an_add, "import": an_import, "rotation": a_rotation}
#: Their next change has a child load a model, which takes a third of a second.
SLOW: dict[str, Callable[..., Scene]] = {"first add": a_first_add}


def _followed(name: str, place: Path, second: bytes, *rotated: str) -> Scene:
    one, two, other = (path.read_bytes() for path in _models(place, second))
    carrier = Carrier()
    bundles = [
        carrier.bundle(place / "1.tar", {("det", 1): one}),
        carrier.bundle(place / "2.tar", {("det", 1): one, ("kws", 1): other}),
    ]
    if rotated:
        carrier.rotate(*rotated)
    bundles += [
        carrier.bundle(place / "3.tar", {("det", 2): two, ("kws", 1): other}),
        carrier.bundle(place / "4.tar", {("det", 2): two, ("det", 3): one}),
    ]
    root = place / "root.json"
    root.write_bytes(carrier.roots["1.root.json"])
    done(place / "home", "trust", "init", "--root", str(root))
    done(place / "home", *IMPORT, str(bundles[1]))
    change, follow_up, stale = ((*IMPORT, str(bundles[i])) for i in (2, 3, 0))
    return _scene(name, place, change, "imported ", follow_up, stale)


def _models(place: Path, second: bytes) -> tuple[Path, Path, Path]:
    models = {"one": zoo.add(1), "two": second, "other": zoo.scale(3)}
    for name, data in models.items():
        (place / f"{name}.onnx").write_bytes(data)
    one, two, other = (place / f"{name}.onnx" for name in models)
    return one, two, other


def _scene(
    name: str,
    place: Path,
    change: tuple[str, ...],
    said: str,
    follow_up: tuple[str, ...],
    stale: tuple[str, ...] = (),
) -> Scene:
    """Run the change and the follow-ups on copies where nothing goes wrong, to know what they lead to."""
    home = place / "home"
    before = syscalls.tree(home)
    old = look(home)
    expected, floors = {}, []
    for changed in (False, True):
        copy = place / f"clean-{changed}"
        syscalls.write_tree(copy, before)
        if changed:
            done(copy, *change)
        state, clean = look(copy), files(copy)
        floors.append(standing(copy))
        done(copy, *follow_up)
        expected[state] = (look(copy), files(copy))
        shutil.rmtree(copy)
    assert len(expected) == 2, "the change changes nothing"
    new = next(state for state in expected if state != old)
    return Scene(
        name, before, change, said, follow_up, stale, old, new, clean, (floors[0], floors[1]), expected
    )
