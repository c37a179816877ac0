"""The client for asyncio: what skerry.client does, for coroutines.

Leaves out: what the calls mean; `Client` says it, and the names and arguments are the same.

    async with AsyncClient("/run/skerry/skerry.sock") as client:
        result = await client.infer("resnet50", {"image": batch})

Rules
 * One client belongs to one event loop, and to as many of its tasks as like.
 * Cancelling a call closes its connection, and the daemon stops the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from skerry import address, calls
from skerry.asynctransport import AsyncPool
from skerry.client import (
    DEFAULT_CONNECTIONS,
    DEFAULT_TIMEOUT_S,
    FORGET_S,
    SLACK_S,
    check_limits,
    open_sharing,
)
from skerry.errors import InvalidRequest, NotFound, NotRunning, SkerryError, Unavailable
from skerry.plans import Planner, question
from skerry.results import Forms, Result
from skerry.retries import Retries

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from skerry.arrays import Array
    from skerry.calls import Call, IndexEntry, ModelStatistics
    from skerry.plans import Plan, Question, Scalar
    from skerry.regions import Region
    from skerry.sharing import Sharing

T = TypeVar("T")


class AsyncClient:
    """A daemon, as the tasks of one event loop use it. Arguments and errors are those of `Client`.

    A further task waits where `max_connections` calls are in progress, in turn.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = 0,
        max_connections: int = DEFAULT_CONNECTIONS,
        shared_memory: bool = False,
    ) -> None:
        check_limits(timeout_s, retries, max_connections)
        self._timeout_s = timeout_s
        self._retries = retries
        where = address.parse(str(target))
        self._pool = AsyncPool(where, max_connections)
        self._planner = Planner(where.host)
        self._forms = Forms()
        self._pages = calls.Pages(where.host)
        self._sharing = open_sharing(where) if shared_memory else None
        self._registering = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See Client.close."""
        if self._sharing is not None:
            await self._forget(self._sharing.regions.close())
        self._pool.close()

    @property
    def shared_memory_active(self) -> bool:
        """See Client.shared_memory_active."""
        return self._sharing is not None and self._sharing.active

    @property
    def shared_memory_refusal(self) -> str:
        """See Client.shared_memory_refusal."""
        return "" if self._sharing is None else self._sharing.reason

    def array(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """See Client.array."""
        return np.zeros(shape, dtype) if self._sharing is None else self._sharing.array(shape, dtype)

    async def infer(  # noqa: PLR0913 - as Client.infer
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        datatypes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        priority: int = 0,
        parameters: Mapping[str, Scalar] | None = None,
    ) -> Result:
        """See Client.infer; the arrays are borrowed until this returns or is cancelled."""
        asked = question(
            model,
            inputs,
            version=version,
            outputs=outputs,
            datatypes=datatypes,
            priority=priority,
            parameters=parameters,
        )
        begun = _now()
        until = begun + (self._timeout_s if timeout_s is None else timeout_s)
        plan = self._planner.plan(asked)
        if self._sharing is None or not self._sharing.active:
            call = calls.Infer(plan, asked, self._forms, timeout_s, request_id)
            return await self._ask(call, begun, until)
        return await self._infer_shared(self._sharing, asked, plan, timeout_s, request_id, begun, until)

    async def get(self, path: str) -> Any:  # noqa: ANN401 - parsed JSON
        """See Client.get."""
        return await self._page(self._pages.document("GET", path))

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - parsed JSON
        """See Client.post."""
        return await self._page(self._pages.document("POST", path, body))

    async def server_live(self) -> bool:
        """See Client.server_live."""
        return await self._says_yes(self._pages.live())

    async def server_ready(self) -> bool:
        """See Client.server_ready."""
        return await self._says_yes(self._pages.ready())

    async def model_ready(self, model: str, version: str | int | None = None) -> bool:
        """See Client.model_ready."""
        return await self._says_yes(self._pages.ready(model, version))

    async def model_metadata(self, model: str, version: str | int | None = None) -> dict[str, Any]:
        """See Client.model_metadata."""
        return await self._page(self._pages.metadata(model, version))

    async def load(self, model: str, parameters: Mapping[str, Scalar] | None = None) -> None:
        """See Client.load."""
        await self._page(self._pages.load(model, parameters))

    async def unload(self, model: str) -> None:
        """See Client.unload."""
        await self._page(self._pages.unload(model))

    async def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """See Client.index."""
        return await self._page(self._pages.index(ready=ready))

    async def statistics(
        self, model: str | None = None, version: str | int | None = None
    ) -> list[ModelStatistics]:
        """See Client.statistics."""
        return await self._page(self._pages.statistics(model, version))

    # -- carrying calls out

    async def _page(self, call: Call[T]) -> T:
        begun = _now()
        return await self._ask(call, begun, begun + self._timeout_s)

    async def _ask(self, call: Call[T], begun: float, until: float) -> T:
        """Carry out `call`, again where skerry.retries says so, no later than `until`."""
        retries: Retries | None = None
        while True:
            connection = await self._pool.take(until)
            kept_alive = connection.kept_alive
            late_s = _now() - begun
            try:
                return await connection.exchange(
                    call, until + call.grace_s, late_s if late_s > SLACK_S else 0.0
                )
            except SkerryError as error:
                if retries is None:
                    retries = Retries(self._retries, repeatable=call.repeatable, uniform=random.uniform)
                pause_s = retries.pause_s(error, kept_alive=kept_alive, left_s=until - _now())
                if pause_s is None:
                    raise
            finally:
                self._pool.give(connection)
            if pause_s:
                await asyncio.sleep(pause_s)

    async def _says_yes(self, call: Call[bool]) -> bool:
        try:
            return await self._page(call)
        except SkerryError:
            return False

    # -- shared memory, as in Client

    async def _infer_shared(  # noqa: PLR0913, PLR0917 - what `infer` has found out by then
        self,
        sharing: Sharing,
        asked: Question,
        plan: Plan,
        timeout_s: float | None,
        request_id: str | None,
        begun: float,
        until: float,
    ) -> Result:
        arrangement = sharing.arrange(asked, plan)
        if arrangement is None or not await self._lend(sharing, arrangement.regions, until):
            call = calls.Infer(plan, asked, self._forms, timeout_s, request_id)
            result = await self._ask(call, begun, until)
            sharing.learn(plan, result)
            return result
        with arrangement:
            for last in (False, True):
                renewed = sharing.renewed
                placed = self._planner.plan(asked, arrangement.places)
                call = calls.Infer(placed, asked, self._forms, timeout_s, request_id, arrangement.locate)
                try:
                    result = await self._ask(call, begun, until)
                    break
                except (InvalidRequest, NotFound):
                    if last or not (
                        await self._lend_again(sharing, arrangement.regions, renewed, until)
                        or arrangement.without_outputs()
                    ):
                        raise
            sharing.learn(plan, result)
            return result

    async def _lend(self, sharing: Sharing, regions: list[Region], until: float) -> bool:
        """Make the daemon know `regions`; False if it takes none."""
        if all(region.registered for region in regions):
            return True
        async with self._registering:
            await self._forget(sharing.regions.dropped())
            for region in regions:
                if region.registered:
                    continue
                if region.doubtful:
                    await self._forget([region.name])
                try:
                    await self._ask(self._pages.register(region.name, region.size_bytes), _now(), until)
                except (Unavailable, NotRunning):
                    region.doubtful = True
                    raise
                except SkerryError as error:
                    await self._forget(sharing.give_up(error.message))
                    return False
                region.registered = True
        return True

    async def _lend_again(self, sharing: Sharing, regions: list[Region], renewed: int, until: float) -> bool:
        """After a refusal: whether the daemon had forgotten `regions` (it was restarted) and knows them again."""
        async with self._registering:
            try:
                known = await self._ask(self._pages.regions(), _now(), until)
            except SkerryError:
                return False  # whatever was wrong before is still wrong
            lost = [region for region in regions if region.name not in known]
            for region in lost:
                region.registered = False
            if lost:
                sharing.renewed += 1
            elif sharing.renewed != renewed:
                return True  # somebody else has told it since
        return bool(lost) and await self._lend(sharing, lost, until)

    async def _forget(self, names: list[str]) -> None:
        """Tell the daemon that regions are gone; if it does not listen, it finds out by itself."""
        with contextlib.suppress(SkerryError):
            for name in names:
                begun = _now()
                await self._ask(self._pages.unregister(name), begun, begun + FORGET_S)


def _now() -> float:
    """The loop's clock, on which its deadlines are."""
    return asyncio.get_running_loop().time()
