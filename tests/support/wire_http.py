"""A client that hides nothing: raw HTTP on a Unix socket, and the inference protocol written out by hand.

Does: bytes of requests, every response of a connection one after the other, tensors in and out of a body.
Leaves out: everything of the product; what is tested here must not help to test itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

#: A test that waits longer for a byte hangs.
HANGS_S = 30.0

#: Datatype -> struct code of one element; FP16 and BF16 are given as the 16 bits they are.
CODES = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "H",
    "BF16": "H",
    "FP32": "f",
    "FP64": "d",
}


class Response(NamedTuple):
    """One answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The JSON part of the body."""
        return json.loads(
            self.body[: int(self.headers.get("inference-header-content-length", len(self.body)))]
        )

    @property
    def tensors(self) -> dict[str, list[Any]]:
        """Output name -> flat list of values, however they came."""
        rest = self.body[len(self.body) - self._binary_bytes :]
        found = {}
        for output in self.json["outputs"]:
            if "data" in output:
                found[output["name"]] = output["data"]
                continue
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = unpack(output["datatype"], rest[:size])
            rest = rest[size:]
        assert not rest
        return found

    @property
    def _binary_bytes(self) -> int:
        header = self.headers.get("inference-header-content-length")
        return 0 if header is None else len(self.body) - int(header)


class Conversation:
    """One connection. What the server sent beyond a response stays for the next one.

    `place` is the path of a Unix socket, or the port of a TCP listener on this machine.
    """

    def __init__(self, place: Path | int) -> None:
        tcp = isinstance(place, int)
        self.sock = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self.sock.settimeout(HANGS_S)
        try:
            self.sock.connect(("127.0.0.1", place) if tcp else str(place))
        except OSError:
            self.sock.close()
            raise
        self._unread = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, data: bytes, *, head_only: bool = False) -> Response:
        self.send(data)
        return self.response(head_only=head_only)

    def response(self, *, head_only: bool = False) -> Response:
        """The next response, a `100 Continue` included; `head_only` after a HEAD request."""
        while b"\r\n\r\n" not in self._unread:
            self._more()
        head = self._take(self._unread.index(b"\r\n\r\n") + 4)[:-4]
        first, *lines = head.decode("ascii").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = 0 if head_only else int(headers.get("content-length", "0"))
        while len(self._unread) < size:
            self._more()
        return Response(int(first.split()[1]), headers, self._take(size))

    def rest(self) -> bytes:
        """Everything until the server closes; fails the test if it does not."""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.sock.recv(1 << 20):
                self._unread += piece
        return self._take(len(self._unread))

    def _take(self, size: int) -> bytes:
        taken = bytes(self._unread[:size])
        del self._unread[:size]
        return taken

    def _more(self) -> None:
        piece = self.sock.recv(1 << 20)
        if not piece:
            raise EOFError(f"the server closed after {self._unread[:500]!r}")
        self._unread += piece


def http(method: str, path: str, body: bytes | None = None, *headers: str, version: str = "1.1") -> bytes:
    """The bytes of one request; Content-Length comes with a body."""
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Tensor(NamedTuple):
    """An input: values, or bytes that are sent as they are."""

    name: str
    datatype: str
    shape: Sequence[int]
    values: Sequence[Any] | bytes
    binary: bool = True


def infer(
    model: str,
    inputs: Sequence[Tensor],
    *headers: str,
    outputs: Sequence[Mapping[str, Any]] | None = None,
    **fields: Any,
) -> bytes:
    """An inference request; `fields` are further keys of its JSON."""
    document: dict[str, Any] = {"inputs": [], **fields}
    tail = b""
    for tensor in inputs:
        described: dict[str, Any] = {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
        }
        if tensor.binary:
            raw = pack(tensor.datatype, tensor.values)
            described["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        else:
            described["data"] = list(tensor.values)
        document["inputs"].append(described)
    if outputs is not None:
        document["outputs"] = list(outputs)
    encoded = json.dumps(document).encode()
    if any(tensor.binary for tensor in inputs):
        headers = (*headers, f"Inference-Header-Content-Length: {len(encoded)}")
    return http("POST", f"/v2/models/{model}/infer", encoded + tail, *headers)


def floats(
    *values: float, name: str = "input", shape: Sequence[int] | None = None, binary: bool = False
) -> Tensor:
    """An FP32 input; one row unless a shape is given."""
    return Tensor(name, "FP32", shape or (1, len(values)), values, binary)


def pack(datatype: str, values: Sequence[Any] | bytes) -> bytes:
    """Values -> raw little-endian bytes."""
    if isinstance(values, bytes):
        return values
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    return struct.pack(f"<{len(values)}{CODES[datatype]}", *values)


def unpack(datatype: str, raw: bytes) -> list[Any]:
    """Raw little-endian bytes -> values."""
    if datatype == "BYTES":
        values = []
        while raw:
            (size,) = struct.unpack_from("<I", raw)
            values.append(raw[4 : 4 + size])
            raw = raw[4 + size :]
        return values
    code = CODES[datatype]
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw))


def metrics(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Prometheus text -> (name, sorted labels) -> value; fails on a line that is none."""
    found = {}
    families: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in families
            families[name] = kind
            continue
        if line.startswith("# HELP "):
            continue
        series, _, value = line.rpartition(" ")
        name, _, labels = series.partition("{")
        assert name in families, line
        assert families[name] in {"counter", "gauge"}
        pairs = []
        if labels:
            assert labels.endswith("}")
            for pair in labels[:-1].split(","):
                label, _, quoted = pair.partition("=")
                assert quoted[0] == quoted[-1] == '"'
                pairs.append((label, quoted[1:-1]))
        key = (name, tuple(sorted(pairs)))
        assert key not in found
        found[key] = float(value)
        assert math.isfinite(found[key])
    return found


@contextlib.contextmanager
def effective_user(uid: int) -> Iterator[None]:
    """Be somebody else for a moment, alone in a group (root only): the kernel tells a server who connected."""
    before, group, groups = os.geteuid(), os.getegid(), os.getgroups()
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)
        os.setegid(group)
        os.setgroups(groups)
