"""Load a model once, in a child with limits, to see whether it loads and what it takes and gives.

For the moment before a model is signed. The daemon's own loading goes through providers.placement.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from providers import wire
from providers.process import describe_exit
from providers.ranking import CPU
from providers.spawn import child_environment
from providers.start import Channels
from skerry.errors import InvalidRequest
from skerry.terms import TensorSpec  # noqa: TC001 - msgspec and readers of Signature need it

if TYPE_CHECKING:
    from providers.sidefiles import SideFile

_SMALL_AREA_BYTES = 4096


class Signature(NamedTuple):
    """What a model takes and gives, as ONNX Runtime's CPU provider sees it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def inspect_model(
    fd: int, *, memory_bytes: int, timeout_s: float, files: tuple[SideFile, ...] = ()
) -> Signature:
    """Load the model behind `fd` on the CPU provider, in a child of its own.

    Args:
        fd: the sealed model; borrowed.
        memory_bytes: address space for loading, beyond what the child has.
        timeout_s: then the child is killed.
        files: the sealed files beside it; borrowed.

    Raises:
        InvalidRequest: it does not load, takes too long or too much, or kills the child; the message says which.
    """
    channels = Channels()
    area = os.memfd_create("skerry-area", os.MFD_CLOEXEC)
    os.ftruncate(area, _SMALL_AREA_BYTES)
    with tempfile.TemporaryDirectory(prefix="skerry-") as empty, contextlib.closing(channels):
        spec = wire.Spec(
            model="candidate",
            device=msgspec.to_builtins(CPU),
            threads=1,
            keep_threads=True,
            memory_bytes=memory_bytes,
            working_directory=empty,
            kind="inspect",
            files=tuple(file.name for file in files),
        )
        descriptors = (*channels.theirs, area, fd, *(file.fd for file in files))
        command = [sys.executable, "-P", "-m", "providers.worker", *map(str, descriptors), str(os.getpid())]
        child = subprocess.Popen(
            command, pass_fds=descriptors, env=child_environment(), stdin=subprocess.DEVNULL
        )
        channels.hand_over()
        os.close(area)
        try:
            channels.control.settimeout(timeout_s)
            channels.control.send(wire.encode(spec))
            word = channels.control.recv(wire.MAX_PACKET_BYTES)
        except TimeoutError:
            raise InvalidRequest(
                f"model: expected it loaded within {timeout_s:g} s, got no answer; the child was killed",
            ) from None
        except OSError:
            word = b""
        finally:
            if sys.exc_info()[0] is not None:
                child.kill()
            channels.close()
            status = child.wait()
    if not word:
        raise InvalidRequest(f"model: expected it to load; its process {describe_exit(status)}")
    if word[:1] == wire.FAILED:
        failure = wire.decode_failure(word[1:])
        raise InvalidRequest(f"model: {failure.message}", failure.hint)
    proof = wire.decode_proof(word[1:])
    return Signature(proof.inputs, proof.outputs)
