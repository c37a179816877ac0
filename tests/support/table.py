"""A real model table with real workers in the test's own process, without a daemon around it.

Does: what the daemon hands a ModelTable, and listings made from models as bytes.
Leaves out: signatures (the listing is simply believed), HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import msgspec

from agent.infer import Exchange
from agent.models import ModelTable
from agent.settings import Config
from agent.witness import Witness
from providers.discovery import Discovery
from providers.launcher import Launcher
from providers.ranking import CPU
from skerry.errors import NotFound
from skerry.manifest import Manifest
from store.blobs import BlobStore
from store.listing import Entry, Listing
from store.trail import StateStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from agent.sharing import Registered
    from agent.version import Version
    from skerry.errors import SkerryError

HANGS_S = 30.0


class Bench:
    """A table, and what it follows."""

    def __init__(self, folder: Path, launcher: Launcher) -> None:
        self.folder = folder
        self.config = Config()
        self.blobs = BlobStore(folder / "blobs")
        self.trail = StateStore(folder / "state.db")
        self.launcher = launcher
        self.witness = Witness(self.trail)
        self._entries: dict[tuple[str, int], Entry] = {}
        discovery = asyncio.get_running_loop().create_future()
        discovery.set_result(Discovery((CPU,)))
        empty = folder / "empty"
        empty.mkdir(exist_ok=True)
        self.table = ModelTable(
            config=lambda: self.config,
            launcher=launcher,
            blobs=self.blobs,
            trail=self.trail,
            witness=self.witness,
            cache=None,
            working_directory=str(empty),
            discovery=discovery,
        )

    def configure(self, **models: Any) -> None:
        """Change keys of the section `models`."""
        section = msgspec.structs.replace(self.config.models, **models)
        self.config = msgspec.structs.replace(self.config, models=section)

    def put(self, model: bytes, name: str, version: int = 1, **manifest: Any) -> None:
        """Into the listing; `follow` makes the table see it."""
        content = self.blobs.ingest([model])
        words = msgspec.convert(manifest, Manifest)
        entry = Entry(name, version, content.digest, content.size_bytes, words, installed=True)
        self._entries[name, version] = entry

    def drop(self, name: str, version: int = 1) -> None:
        del self._entries[name, version]

    async def follow(self) -> None:
        await self.table.follow(Listing(1, owner=True, entries=tuple(self._entries.values())))

    def states(self, name: str) -> dict[int, str]:
        """Version -> its state, "ASLEEP" for one that the next request loads."""
        return {
            version.number: "ASLEEP" if version.asleep else str(version.state)
            for version in self.table.all()
            if version.name == name
        }

    async def ask(self, name: str, value: float = 1.0, number: int | None = None) -> float:
        """One request to a model of the signature of zoo.add, waiting for the model; raises what refuses it."""
        version = await self.table.ready(name, number, HANGS_S)
        client = Asker()
        Exchange(version, asyncio.get_running_loop(), client).start(*begun(value), "uid:0", None)
        return await client.number()


def begun(value: float) -> tuple[memoryview, int]:
    """A request's body, and the length of the JSON in it, which is all of it."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 1], "data": [value]}
    body = json.dumps({"inputs": [tensor]}).encode()
    return memoryview(body), len(body)


class Asker:
    """The client of one exchange."""

    owner = 0

    def __init__(self) -> None:
        self._done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.exchange: Exchange | None = None

    def answer(self, json_bytes: bytes, parts: list[memoryview], release: Callable[[], None]) -> None:
        assert not parts
        release()
        self._done.set_result(json.loads(json_bytes))

    def find_region(self, name: str) -> Registered:
        raise NotFound(name)

    def refuse(self, error: SkerryError) -> None:
        self._done.set_exception(error)

    def continued(self, exchange: Exchange) -> None:
        self.exchange = exchange

    async def document(self) -> dict[str, Any]:
        return await asyncio.wait_for(self._done, HANGS_S)

    async def number(self) -> float:
        return float((await self.document())["outputs"][0]["data"][0])


def run(story: Callable[[Bench], Awaitable[Any]]) -> Callable[..., Any]:
    """A test that is a story; it takes the fixture `played`."""
    return lambda played: played(story)


def version(made: Bench, name: str, number: int | None = None) -> Version:
    return made.table.get(name, number)


async def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until `condition` returns something true, and return that."""
    async with asyncio.timeout(HANGS_S):
        while not (found := condition()):  # noqa: ASYNC110 - the table tells nobody, and has no need to
            await asyncio.sleep(0.005)
    assert found, what
    return found


@contextlib.contextmanager
def held(version: Version) -> Iterator[None]:
    """A lease, as a request in progress has one."""
    version.acquire()
    try:
        yield
    finally:
        version.release()


class Stage:
    """One event loop and one launcher for many stories; each gets a table of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._launcher = self._runner.run(self._make())

    async def _make(self) -> Launcher:
        return Launcher()

    def play(self, folder: Path, story: Callable[[Bench], Awaitable[Any]]) -> Any:
        """Run a story that takes a bench; what it returns."""
        return self._runner.run(self._play(folder, story))

    async def _play(self, folder: Path, story: Callable[[Bench], Awaitable[Any]]) -> Any:
        bench = Bench(folder, self._launcher)
        try:
            async with asyncio.timeout(3 * HANGS_S):
                return await story(bench)
        finally:
            await bench.table.close()
            bench.witness.close()
            bench.trail.close()

    def close(self) -> None:
        self._runner.run(self._launcher.close())
        self._runner.close()
