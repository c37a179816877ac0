"""A request's tensors in shared memory: from the names that it gives to where they lie.

Leaves out: names and whose they are (agent.ipc.regions), the memory (providers.region).

Rules
 * Every place is held against what was registered, before a worker hears of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from providers.job import Target
from skerry.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from providers.region import Region
    from skerry import oip


class Registered(NamedTuple):
    """A name and what it stands for: `size_bytes` bytes of a region, from `offset` on. Compare by identity."""

    name: str
    key: str
    offset: int
    size_bytes: int
    region: Region


class Shared:
    """Where the tensors of a request lie, in the form that a RequestLayout has.

    Args:
        inputs: what the request says of its inputs.
        form: and of its outputs.
        find: what its user calls by a name; raises NotFound.

    Attributes:
        tensors: the inputs; offsets count in the region or, without one, from the beginning of the request.
        regions: where each lies; None: with the request.
        targets: output -> where it goes.
        used: the registrations.

    Raises:
        NotFound: nothing is registered under one of the names.
        InvalidRequest: a place lies outside what is registered.
    """

    __slots__ = ("regions", "targets", "tensors", "used")

    def __init__(self, inputs: oip.Inputs, form: oip.Format, find: Callable[[str], Registered]) -> None:
        names = sorted({place.region for place in (*inputs.places.values(), *form.places.values())})
        known = {name: find(name) for name in names}
        self.used = tuple(known.values())
        tensors = []
        regions: list[Region | None] = []
        for view in inputs.views:
            place = inputs.places.get(view.name)
            if place is None:
                tensors.append(view)
                regions.append(None)
                continue
            offset = _offset_in(known[place.region], place, f"input {view.name!r}")
            tensors.append(view._replace(offset=offset))
            regions.append(known[place.region].region)
        self.tensors = tuple(tensors)
        self.regions = tuple(regions)
        self.targets = tuple(
            (
                name,
                Target(
                    known[place.region].region,
                    _offset_in(known[place.region], place, f"output {name!r}"),
                    place.size_bytes,
                ),
            )
            for name, place in form.places.items()
        )


def _offset_in(registered: Registered, place: oip.Place, what: str) -> int:
    """Where the place begins in the region's memory."""
    if place.offset + place.size_bytes > registered.size_bytes:
        raise InvalidRequest(
            f"{what}: expected it within the {registered.size_bytes} bytes of shared memory region"
            f" {registered.name!r}, got {place.size_bytes} bytes from {place.offset} on"
        )
    return registered.offset + place.offset
