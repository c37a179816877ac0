"""The largest and most awkward inputs that ceilings let through, one after the other in a process with little memory.

Exit status 0 if each took at most MOST_S of processor time, and all stayed within MOST_BYTES.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[0] / "support"), str(HERE.parents[1])]

import untrusted  # noqa: E402 - the path first

from agent import yamltree  # noqa: E402 - likewise
from agent.triton import pbtxt  # noqa: E402 - likewise
from providers import protowire  # noqa: E402 - likewise
from skerry.errors import SkerryError  # noqa: E402 - likewise
from store import oms, tarball, trust  # noqa: E402 - likewise

MOST_S = 10  # the slowest takes half a second on the development machine
MOST_BYTES = 1536 << 20  # of address space, 400 MB of which are libraries


def full(head, piece, tail, size):
    """`piece` as often as it fits between `head` and `tail`."""
    return head + piece * ((size - len(head) - len(tail)) // len(piece)) + tail


def bombs(corpus):
    """Parser's name, what it is, the input."""
    text, tree = pbtxt.MAX_BYTES, yamltree.MAX_FILE_BYTES
    yield "pbtxt", "values", full(b"a: [", b"1,", b"1]", text)
    yield "pbtxt", "one name", full(b"", b"x", b": 1", text)
    yield "pbtxt", "digits", full(b"a: 1.", b"1", b"x", text)
    yield "pbtxt", "remarks", full(b"", b"#\n", b"", text)
    yield "pbtxt", "escapes", full(b'a: "', b"\\x41", b'"', text)
    yield "pbtxt", "strings", full(b"a: ", b'""', b"", text)
    yield "pbtxt", "open strings", full(b"a: ", b"\"'", b"", text)
    yield "yaml", "depth", full(b"", b"[", b"", tree)
    yield "yaml", "a key", full(b"? ", b"x", b"\n: 1", tree)
    yield "yaml", "a number", full(b"threads: ", b"9", b"", tree)
    yield "yaml", "a time", full(b"keep_alive: ", b"9", b"h", tree)
    yield "yaml", "base 60", full(b"threads: 1", b":59", b"", tree)
    yield "custom", "a list", full(b'\0{"golden":[{"inputs":{"x":[', b"[],", b"0]}}]}", 1 << 20)
    yield "custom", "memory", b'\0{"limits":{"memory":"' + b"9" * 400 + b'"}}'
    yield "custom", "a number", full(b'\0{"golden":[{"inputs":{"x":', b"9", b"}}]}", 1 << 20)
    yield "oms", "depth", full(b'\0{"verificationMaterial":', b"[", b"", oms.MAX_BUNDLE_BYTES)
    yield (
        "oms",
        "a list",
        full(b'\0{"verificationMaterial":{"certificate":[', b"[],", b"0]}}", oms.MAX_BUNDLE_BYTES),
    )
    yield (
        "oms",
        "signatures",
        full(b'\0{"dsseEnvelope":{"signatures":[', b'{"sig":""},', b"{}]}}", oms.MAX_BUNDLE_BYTES),
    )
    said = json.loads(corpus["oms"][2][1:])
    piece = said["predicate"]["resources"][0]
    said["predicate"]["resources"] = [piece | {"name": f"f{n}"} for n in range(oms.MAX_RESOURCES)]
    yield "oms", "files", b"\2" + json.dumps(said).encode()
    header = tarball.header("a", 0)
    yield (
        "tar",
        "members",
        b"\0" + b"".join(tarball.header(f"a{n}", 0) for n in range(tarball.MAX_MEMBERS + 1)),
    )
    yield "tar", "zeros", b"\0" + header + bytes(8 << 20)
    yield "onnx", "fields", b"\x78\x01" * (protowire.MAX_FIELDS + 1)
    yield "onnx", "nodes", b"\x08\x09\x42\x00\x3a" + _varint(120_000) + b"\x0a\x00" * 60_000
    yield "onnx", "inputs", b"\x08\x09\x42\x00\x3a" + _varint(3_000_000) + b"\x5a\x00" * 1_500_000
    yield "tuf", "a root", full(b"\0[", b"[],", b"0]", trust.MAX_ROOT_BYTES)
    yield "tuf", "depth", full(b"\0", b"[", b"", trust.MAX_ROOT_BYTES)
    yield "tuf", "digits", full(b"\0", b"9", b"", trust.MAX_ROOT_BYTES)


def _varint(number):
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def main():
    """See the module."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        parsers = untrusted.parsers(Path(folder))
        for name, what, data in bombs({name: parser.corpus for name, parser in parsers.items()}):
            began = time.process_time()
            try:
                parsers[name].run(data)
                outcome = "accepted"
            except SkerryError as error:
                outcome = f"refused: {error.message[:100]}"
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
                outcome = f"FAILED: {error!r:.300}"
                failed += 1
            took_s = time.process_time() - began
            failed += took_s > MOST_S
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{name:8}{what:14}{len(data):9} bytes {took_s:7.2f} s {peak_mb:5} MB  {outcome}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
