"""`skerry model add`: from a file, or a directory of a Triton repository, to a signed version that is served.

Does: sign and commit exactly the bytes that were examined, tell the daemon and wait for its verdict.
Leaves out: examining them (agent.cli.candidates), the registry itself (store.registry).

Rules
 * Nothing is signed that did not load.
 * Of several versions, those before one that fails are signed; the command can be repeated.
 * The daemon decides what it serves. A version that it refuses stays in the registry, and the command
   says why.
"""

from __future__ import annotations

import math
import shlex
import time
from typing import TYPE_CHECKING, Any

import msgspec

from agent import paths
from agent.cli import render
from agent.cli.candidates import candidates, examined
from skerry.errors import DeadlineExceeded, NotRunning, Unavailable

if TYPE_CHECKING:
    from agent.cli.candidates import Candidate, Examined, Request
    from agent.cli.session import Session
    from providers.inspect import Signature
    from skerry.client import Client
    from skerry.terms import TensorSpec
    from store.listing import Entry

SERVED_S = 120.0  # inspection again, on every candidate device, and the probe
POLL_S = 0.05

# A request with more numbers than this is no example to paste.
_EXAMPLE_ELEMENTS = 64
_TEXT_DATATYPES = {
    "BOOL",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "FP32",
    "FP64",
}


def add(session: Session, request: Request) -> None:
    """Admit a model and say how to use it.

    Raises:
        InvalidRequest: the file is no model that can be served.
        ConfigError: the manifest is wrong.
        Untrusted: the registry on disk does not verify, this version exists with other bytes, or the claimed
            provenance is not that of the file.
        Unavailable: it is signed, and the daemon does not serve it; the message has the reason.
    """
    for candidate in candidates(session, request):
        entry, signature = _admit(session, candidate)
    if _announce(session, entry, wait=request.wait):
        session.say("try it", _example(session, entry.name, signature))


def _admit(session: Session, candidate: Candidate) -> tuple[Entry, Signature]:
    with examined(session, candidate) as found:
        return _sign(session, candidate, found), found.signature


def _sign(session: Session, candidate: Candidate, found: Examined) -> Entry:
    paths.prepare(session.paths)
    with session.remarks.status("signing"):
        entry = session.registry.add(
            found.model,
            candidate.name,
            candidate.version,
            candidate.manifest,
            files=found.files,
            provenance=found.provenance,
        )
    session.say("signed", f"{entry.name}/{entry.version}, {entry.digest}")
    return entry


def refresh(session: Session) -> dict[str, Any] | None:
    """Have the daemon read the registry again: its models, or None where no daemon runs."""
    try:
        with session.client() as client:
            page: dict[str, Any] = client.post("/skerry/v1/registry/refresh")
            return page
    except NotRunning:
        return None


def _announce(session: Session, entry: Entry, *, wait: bool) -> bool:
    """Tell the daemon; True once it serves the version."""
    started = time.monotonic()
    with session.remarks.status("telling the daemon"):
        told = refresh(session)
    if told is None:
        session.say("no daemon", "it will be served when one starts: `skerry run`")
    if told is None or not wait:
        return False
    with session.remarks.status("waiting until it is served"), session.client() as client:
        model = _settled(client, entry, started + SERVED_S)
    if model.get("asleep"):
        session.say("admitted", f"{entry.name}/{entry.version}: {model['reason']}")
        return True
    if model["state"] != "READY":
        raise Unavailable(
            f"{entry.name}/{entry.version}: signed, and not served: {model['reason']}",
            f"`skerry why {entry.name}` shows what was tried; `skerry model remove` takes it back",
        )
    took_s = time.monotonic() - started
    session.say(
        "serving",
        f"{entry.name}/{entry.version} on {render.device(model['device'])} after {took_s:.2f} s",
    )
    return True


def _settled(client: Client, entry: Entry, deadline: float) -> dict[str, Any]:
    """The model's line once it is READY, or UNAVAILABLE for a reason."""
    while time.monotonic() < deadline:
        for model in client.get("/skerry/v1/models")["models"]:
            if (model["name"], model["version"]) != (entry.name, str(entry.version)):
                continue
            if model["state"] == "READY" or (model["state"] == "UNAVAILABLE" and model["reason"]):
                return dict(model)
        time.sleep(POLL_S)
    raise DeadlineExceeded(
        f"{entry.name}/{entry.version}: signed, and neither served nor refused in {SERVED_S:g} s"
    )


def _example(session: Session, name: str, signature: Signature) -> str:
    """A command that works when it is pasted, if the input is small enough to be typed."""
    small = all(
        spec.datatype in _TEXT_DATATYPES and math.prod(map(abs, spec.shape)) <= _EXAMPLE_ELEMENTS
        for spec in signature.inputs
    )
    if not small:
        home = f"--home {shlex.quote(session.home)} " if session.home else ""
        files = " ".join(
            f"--input {shlex.quote(f'{spec.name}=@{spec.name}.npy')}" for spec in signature.inputs
        )
        return f"skerry {home}infer {name} {files}"
    body = {"inputs": [_zeros(spec) for spec in signature.inputs]}
    url = f"http://localhost/v2/models/{name}/infer"
    data = shlex.quote(msgspec.json.encode(body).decode())
    return f"curl --unix-socket {shlex.quote(session.socket)} {url} -d {data}"


def _zeros(spec: TensorSpec) -> dict[str, Any]:
    shape = [abs(dimension) for dimension in spec.shape]  # -1, any number, becomes 1
    zero = False if spec.datatype == "BOOL" else 0
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": [zero] * math.prod(shape)}
