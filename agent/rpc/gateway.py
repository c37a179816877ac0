"""The gateway process: `python -m agent.rpc.gateway FD PARENT OPTIONS`.

Does: put a gRPC server, the door in front of it and the way to the daemon together; serve until standard input ends.
Leaves out: everything that any one of them does, and when there is a gateway (agent.rpc.supervisor).

A process of its own, because grpcio costs 30 MB and its core is C that parses what strangers send. When it dies, the
daemon and its models go on, and clients connect to the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

import grpc
import msgspec

from agent.rpc.front import Front
from agent.rpc.link import Link
from agent.rpc.options import Options
from agent.rpc.service import Service
from providers import sandbox
from skerry.terms import MIB

log = logging.getLogger("agent.rpc.gateway")  # this module is __main__

#: Calls under way at most, streams among them; further ones are refused with RESOURCE_EXHAUSTED.
MAX_CALLS = 1024
#: What a message has beside its tensors. The ceiling proper is the daemon's, and its answer says what to raise.
_MESSAGE_SLACK_BYTES = MIB
#: For clients to take the last bytes of their answers.
_FLUSH_S = 1.0


async def serve(listening: socket.socket, options: Options) -> None:
    """Serve clients of `listening` until standard input ends."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    os.set_blocking(0, False)
    loop.add_reader(0, ended.set)
    link = Link(options.daemon)
    inner = Path(options.inner)
    inner.parent.mkdir(mode=0o700, exist_ok=True)
    inner.parent.chmod(0o700)
    server = grpc.aio.server(
        maximum_concurrent_rpcs=MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", options.max_body_bytes + _MESSAGE_SLACK_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_connection_idle_ms", int(options.idle_timeout_s * 1000)),
            ("grpc.server_handshake_timeout_ms", int(options.header_timeout_s * 1000)),
        ],
    )
    front = Front(listening, str(inner), options.max_connections)
    service = Service(link, front.uids)
    server.add_generic_rpc_handlers(service.handlers())
    server.add_insecure_port(f"unix:{inner}")
    await server.start()
    front.open()
    log.info("gRPC gateway ready")
    await ended.wait()
    loop.remove_reader(0)
    front.close()
    service.stop()
    await server.stop(options.drain_s)
    await front.drain(_FLUSH_S)
    link.close()


def main() -> None:
    """Run the process."""
    descriptor, parent, text = sys.argv[1:]
    sandbox.die_with_parent(int(parent))
    sandbox.ignore_stop_signals()
    sandbox.harden()
    options = msgspec.json.decode(text, type=Options)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    listening = socket.socket(fileno=int(descriptor))
    listening.setblocking(False)  # noqa: FBT003 - the standard library's signature
    try:
        import uvloop  # noqa: PLC0415 - not on every system
    except ImportError:
        asyncio.run(serve(listening, options))
    else:
        uvloop.run(serve(listening, options))


if __name__ == "__main__":
    main()
