"""The gateway's connections to the daemon, against a server that plays tricks."""

import asyncio
import contextlib

import pytest

from agent.rpc import link
from agent.rpc.link import Link
from skerry.errors import DeadlineExceeded, InternalError, Overloaded, Unavailable

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CLOSE = b""


class Server:
    """Answers the requests that come, whichever connection they come over, with the given answers in order."""

    def __init__(self, path, answers):
        self.path = path
        self.asked = []
        self.came = asyncio.Event()
        self.connections = 0
        self._answers = iter(answers)
        self._writers = []

    async def __aenter__(self):
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        self._writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().partition("\r\ncontent-length: ")[2].partition("\r\n")[0])
                self.asked.append((head, await reader.readexactly(size)))
                self.came.set()
                answer = next(self._answers)
                writer.write(answer)
                await writer.drain()
                if answer == CLOSE or b"200 OK" not in answer[:20]:
                    break
        writer.close()


def play(tmp_path, answers, script):
    async def run():
        async with Server(str(tmp_path / "s"), answers) as server:
            daemon = Link(server.path)
            try:
                await script(daemon, server)
            finally:
                daemon.close()

    asyncio.run(run())


def refusal(kind, more=b""):
    body = b'{"error":"no","hint":"wait"}'
    return b"HTTP/1.1 503 X\r\nContent-Length: %d\r\nSkerry-Error: %b\r\n%b\r\n%b" % (
        len(body),
        kind,
        more,
        body,
    )


def test_a_connection_is_kept_and_belongs_to_one_user(tmp_path):
    async def script(daemon, server):
        for uid in (1, 2, 1, 2):
            reply = await daemon.ask(uid, "GET", "/x")
            assert (reply.ok, reply.json, bytes(reply.tensors)) == (True, b"ok", b"")
        assert server.connections == 2
        assert ["Acting-Uid: 1" in head for head, _ in server.asked] == [True, False, True, False]

    play(tmp_path, [GOOD] * 4, script)


def test_a_long_answer_is_parted_where_its_json_ends(tmp_path):
    tensors = bytes(range(256)) * 2000
    answer = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 4\r\nContent-Length: %d\r\n\r\n{  }%b"

    async def script(daemon, server):
        reply = await daemon.ask(0, "POST", "/x", b"{}", [tensors, b"tail"])
        assert (reply.json, bytes(reply.tensors)) == (b"{  }", tensors)
        assert server.asked[0][1] == b"{}" + tensors + b"tail"

    play(tmp_path, [answer % (4 + len(tensors), tensors)], script)


def test_what_a_kept_connection_lost_is_asked_again_unless_it_changes_something(tmp_path):
    async def script(daemon, server):
        await daemon.ask(0, "GET", "/x")
        await daemon.ask(0, "GET", "/again")
        with pytest.raises(Unavailable, match="broke"):
            await daemon.ask(0, "POST", "/load", changes=True)
        assert [head.split()[1] for head, _ in server.asked] == ["/x", "/again", "/again", "/load"]

    play(tmp_path, [GOOD, CLOSE, GOOD, CLOSE], script)


def test_an_answer_that_breaks_off_is_not_asked_again(tmp_path):
    async def script(daemon, server):
        await daemon.ask(0, "GET", "/x")
        with pytest.raises(Unavailable, match="broke"):
            await daemon.ask(0, "GET", "/x")
        assert len(server.asked) == 2

    play(tmp_path, [GOOD, b"HTTP/1.1 503 X\r\nContent-Length: 9\r\n\r\nhal"], script)


def test_a_refusal_is_the_error_that_the_daemon_raised(tmp_path):
    async def script(daemon, _):
        with pytest.raises(Overloaded) as full:
            await daemon.ask(0, "GET", "/x")
        assert (full.value.message, full.value.hint, full.value.retry_after_s) == ("no", "wait", 7)
        with pytest.raises(DeadlineExceeded):
            await daemon.ask(0, "GET", "/x")
        with pytest.raises(InternalError):
            await daemon.ask(0, "GET", "/x")
        assert not (await daemon.ask(0, "GET", "/x", may_fail=True)).ok

    answers = [refusal(b"Overloaded", b"Retry-After: 7\r\n"), refusal(b"DeadlineExceeded"), refusal(b"os")]
    play(tmp_path, [*answers, refusal(b"Unavailable")], script)


def test_a_caller_that_goes_away_takes_its_connection_with_it(tmp_path):
    async def script(daemon, server):
        slow = asyncio.ensure_future(daemon.ask(0, "POST", "/x", b"{}"))
        await server.came.wait()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert (await daemon.ask(0, "GET", "/y")).ok
        assert server.connections == 2

    play(tmp_path, [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhal", GOOD], script)


def test_nonsense_ends_the_connection_and_not_the_gateway(tmp_path):
    async def script(daemon, _):
        for _ in range(2):
            with pytest.raises(Unavailable):
                await daemon.ask(0, "GET", "/x")

    endless = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2 * link.JOIN_BYTES
    too_long = GOOD + b"and more"
    play(tmp_path, [endless, too_long], script)


def test_nobody_there_is_unavailable(tmp_path):
    async def run():
        with pytest.raises(Unavailable, match="socket"):
            await Link(str(tmp_path / "none")).ask(0, "GET", "/x")

    asyncio.run(run())
