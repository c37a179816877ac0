"""The client: ask a Skerry daemon for predictions, from a program of your own.

Does: the Open Inference Protocol v2 over a Unix socket (or TCP), tensors in binary both ways or, if asked to, in
shared memory.
Leaves out: asyncio (skerry.asyncclient, the same for coroutines) and gRPC.

    with Client("/run/skerry/skerry.sock") as client:
        scores = client.infer("resnet50", {"image": batch}).outputs["scores"]

Rules
 * Needs numpy and the standard library only.
 * One client may be used by many threads, and survives a fork: the child opens connections of its own.
 * What may be sent twice, and when, stands in skerry.retries.

Source: https://github.com/kserve/open-inference-protocol, inference_rest.md; Triton's binary tensor data.
"""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from skerry import address, calls
from skerry.errors import InvalidRequest, NotFound, NotRunning, SkerryError, Unavailable
from skerry.plans import MAX_TIMEOUT_S, Planner, question
from skerry.results import Forms, Result
from skerry.retries import MAX_RETRIES, Retries
from skerry.transport import Pool

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

__all__ = ["Client", "Result"]

DEFAULT_TIMEOUT_S = 60.0  # twice the time a run may take unless a manifest says otherwise
DEFAULT_CONNECTIONS = 8
MAX_CONNECTIONS = 1024

#: Time lost before sending that is not worth another header: the server remembers headers by their bytes.
SLACK_S = 0.005
#: For each region that the daemon is told to forget while the client closes.
FORGET_S = 1.0


class Client:
    """A daemon, as one program uses it. Connections are opened when they are needed and kept alive.

    Args:
        target: the path of the daemon's Unix socket, or "http://host:port".
        timeout_s: the longest wait for an answer where the call does not say.
        retries: how often a call may be sent again, where that is safe; see skerry.retries.
        max_connections: opened at most; a further thread waits for one.
        shared_memory: send and receive large tensors through shared memory, if the daemon is on this machine and
            takes it; see `shared_memory_active` and `array`.

    Every method may raise NotRunning (nothing listens there), Denied (the socket or the page is not for
    this user), DeadlineExceeded (no answer in time), ConnectionLost (it broke) and what the server refused, by its
    status code.
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
        self._pool = Pool(where, max_connections)
        self._planner = Planner(where.host)
        self._forms = Forms()
        self._pages = calls.Pages(where.host)
        self._sharing = open_sharing(where) if shared_memory else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and remove shared memory; the next call opens others.

        Arrays that lie in shared memory stay valid.
        """
        sharing = self._sharing
        if sharing is not None:
            self._forget(sharing.regions.close())
        self._pool.close()

    @property
    def shared_memory_active(self) -> bool:
        """Whether large tensors go through shared memory: it was asked for, and the daemon did not refuse it."""
        return self._sharing is not None and self._sharing.active

    @property
    def shared_memory_refusal(self) -> str:
        """What the daemon said when it refused shared memory; "" if it did not."""
        return "" if self._sharing is None else self._sharing.reason

    def array(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeros that are born in shared memory, so that the daemon reads them where they are written.

        Without shared memory, or without room for it, they are an ordinary array: code need not care. The memory
        is the caller's as long as any array looks into it.

        Args:
            shape: as numpy's.
            dtype: any of a fixed size.
        """
        if self._sharing is None:
            return np.zeros(shape, dtype)
        return self._sharing.array(shape, dtype)

    def infer(  # noqa: PLR0913 - what a request may carry; all but two by keyword
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
        """Run `model` once.

        Args:
            model: its name in the registry.
            inputs: input name -> array of any shape the model takes. Borrowed until this returns.
                Arrays of bytes, str or objects become BYTES; ml_dtypes' bfloat16 becomes BF16.
            version: None is the one the node serves.
            outputs: names of the wanted outputs; None is all.
            datatypes: input name -> datatype where the array cannot tell: {"x": "BF16"} for uint16 bits.
            timeout_s: the whole wait, retries included. The server is told, gives up after it and says so; it
                gets two seconds more to say it.
            request_id: comes back in the result.
            priority: 1 is the highest; 0 is the node's default.
            parameters: passed on as they are.

        Raises:
            InvalidRequest: names, shapes or datatypes the model does not take.
            NotFound: no such model or version.
            Unavailable: it is not ready; Overloaded, a subclass: nothing ran, try again later.
            ConnectionLost: the connection broke; it may have run.
            ExecutionFailed: the run failed or its worker process died.
        """
        asked = question(
            model,
            inputs,
            version=version,
            outputs=outputs,
            datatypes=datatypes,
            priority=priority,
            parameters=parameters,
        )
        begun = time.monotonic()
        until = begun + (self._timeout_s if timeout_s is None else timeout_s)
        plan = self._planner.plan(asked)
        if self._sharing is None or not self._sharing.active:
            return self._ask(calls.Infer(plan, asked, self._forms, timeout_s, request_id), begun, until)
        return self._infer_shared(self._sharing, asked, plan, timeout_s, request_id, begun, until)

    def get(self, path: str) -> Any:  # noqa: ANN401 - parsed JSON
        """The JSON at `path`, such as "/v2" or "/skerry/v1/status"; {} where the body is empty."""
        return self._page(self._pages.document("GET", path))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - parsed JSON
        """Post a JSON object (nothing if None) and return the JSON that answers."""
        return self._page(self._pages.document("POST", path, body))

    def server_live(self) -> bool:
        """Whether a daemon answers at all."""
        return self._says_yes(self._pages.live())

    def server_ready(self) -> bool:
        """Whether the daemon answers and serves what it should."""
        return self._says_yes(self._pages.ready())

    def model_ready(self, model: str, version: str | int | None = None) -> bool:
        """Whether this model would answer now; False as well where no daemon runs."""
        return self._says_yes(self._pages.ready(model, version))

    def model_metadata(self, model: str, version: str | int | None = None) -> dict[str, Any]:
        """Names, datatypes and shapes: {"name", "versions", "platform", "inputs": […], "outputs": […]}."""
        return self._page(self._pages.metadata(model, version))

    def load(self, model: str, parameters: Mapping[str, Scalar] | None = None) -> None:
        """Load a model of the registry; returns when it is READY. Needs the right to administer.

        Raises:
            NotFound: no such model.
            Unavailable: it could not be loaded.
            Unsupported: a parameter that the daemon does not take, such as a configuration.
        """
        self._page(self._pages.load(model, parameters))

    def unload(self, model: str) -> None:
        """Unload a model; what it was asked before is still answered. Needs the right to administer."""
        self._page(self._pages.unload(model))

    def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Every version in the registry with its state; only those that are READY if `ready`."""
        return self._page(self._pages.index(ready=ready))

    def statistics(self, model: str | None = None, version: str | int | None = None) -> list[ModelStatistics]:
        """Counts and times since each version was loaded: of one version, one model, or all."""
        return self._page(self._pages.statistics(model, version))

    # -- carrying calls out

    def _page(self, call: Call[T]) -> T:
        begun = time.monotonic()
        return self._ask(call, begun, begun + self._timeout_s)

    def _ask(self, call: Call[T], begun: float, until: float) -> T:
        """Carry out `call`, again where skerry.retries says so, no later than `until`."""
        retries: Retries | None = None
        while True:
            connection = self._pool.take(until)
            kept_alive = connection.kept_alive
            late_s = time.monotonic() - begun
            try:
                return connection.exchange(call, until + call.grace_s, late_s if late_s > SLACK_S else 0.0)
            except SkerryError as error:
                if retries is None:
                    retries = Retries(self._retries, repeatable=call.repeatable, uniform=random.uniform)
                left_s = until - time.monotonic()
                pause_s = retries.pause_s(error, kept_alive=kept_alive, left_s=left_s)
                if pause_s is None:
                    raise
            finally:
                self._pool.give(connection)
            if pause_s:
                time.sleep(pause_s)

    def _says_yes(self, call: Call[bool]) -> bool:
        try:
            return self._page(call)
        except SkerryError:
            return False

    # -- shared memory

    def _infer_shared(  # noqa: PLR0913, PLR0917 - what `infer` has found out by then
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
        if arrangement is None or not self._lend(sharing, arrangement.regions, until):
            result = self._ask(calls.Infer(plan, asked, self._forms, timeout_s, request_id), begun, until)
            sharing.learn(plan, result)
            return result
        with arrangement:
            for last in (False, True):
                renewed = sharing.renewed
                placed = self._planner.plan(asked, arrangement.places)
                call = calls.Infer(placed, asked, self._forms, timeout_s, request_id, arrangement.locate)
                try:
                    result = self._ask(call, begun, until)
                    break
                except (InvalidRequest, NotFound):
                    # Not for what was asked, perhaps, but for where it lies.
                    if last or not (
                        self._lend_again(sharing, arrangement.regions, renewed, until)
                        or arrangement.without_outputs()
                    ):
                        raise
            sharing.learn(plan, result)
            return result

    def _lend(self, sharing: Sharing, regions: list[Region], until: float) -> bool:
        """Make the daemon know `regions`; False if it takes none."""
        if all(region.registered for region in regions):
            return True
        with sharing.regions.registering:
            self._forget(sharing.regions.dropped())
            for region in regions:
                if region.registered:
                    continue
                if region.doubtful:
                    self._forget([region.name])
                try:
                    self._ask(self._pages.register(region.name, region.size_bytes), time.monotonic(), until)
                except (Unavailable, NotRunning):
                    region.doubtful = True
                    raise
                except SkerryError as error:
                    self._forget(sharing.give_up(error.message))
                    return False
                region.registered = True
        return True

    def _lend_again(self, sharing: Sharing, regions: list[Region], renewed: int, until: float) -> bool:
        """After a refusal: whether the daemon had forgotten `regions` (it was restarted) and knows them again."""
        with sharing.regions.registering:
            try:
                known = self._ask(self._pages.regions(), time.monotonic(), until)
            except SkerryError:
                return False  # whatever was wrong before is still wrong
            lost = [region for region in regions if region.name not in known]
            for region in lost:
                region.registered = False
            if lost:
                sharing.renewed += 1
            elif sharing.renewed != renewed:
                return True  # somebody else has told it since
        return bool(lost) and self._lend(sharing, lost, until)

    def _forget(self, names: list[str]) -> None:
        """Tell the daemon that regions are gone; if it does not listen, it finds out by itself."""
        with contextlib.suppress(SkerryError):
            for name in names:
                begun = time.monotonic()
                self._ask(self._pages.unregister(name), begun, begun + FORGET_S)


def check_limits(timeout_s: float, retries: int, max_connections: int) -> None:
    """Raise InvalidRequest unless these options of a client are within their ceilings."""
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout_s: expected more than 0 and at most {MAX_TIMEOUT_S:.0f}, got {timeout_s}"
        )
    if not 0 <= retries <= MAX_RETRIES:
        raise InvalidRequest(f"retries: expected 0 to {MAX_RETRIES}, got {retries}")
    if not 1 <= max_connections <= MAX_CONNECTIONS:
        raise InvalidRequest(f"max_connections: expected 1 to {MAX_CONNECTIONS}, got {max_connections}")


def open_sharing(where: address.Address) -> Sharing:
    """The shared memory of a client that wants it."""
    from skerry.sharing import Sharing  # noqa: PLC0415 - only Linux has what it needs

    return Sharing(where.owner_uid)
