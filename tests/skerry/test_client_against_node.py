"""Both clients against a real daemon: what they get, many at once, cancelled, forked, and through shared memory."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zoo
from node import temporary_node

from skerry import AsyncClient, Client
from skerry.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable

#: Of slow_model: far longer than any test waits.
FOR_EVER = {"iterations": np.array([50_000_000])}


@pytest.fixture(scope="module")
def node():
    with temporary_node() as running:
        running.add(zoo.add(1), "plus")
        running.add(zoo.scale(3), "times")
        running.add(zoo.identity("BYTES"), "text")
        running.add(zoo.slow_model(), "slow")
        running.start()
        yield running


@pytest.fixture
def client(node):
    with Client(node.socket) as made:
        yield made


def row(*values):
    return {"input": np.array([values], np.float32)}


def test_two_models_answer_in_turn_with_ids_and_without(client):
    for round_ in range(3):
        assert client.infer("plus", row(1, 2)).outputs["output"].tolist() == [[2, 3]]
        result = client.infer("times", row(round_), request_id=f"r{round_}", priority=1, timeout_s=30)
        assert result.outputs["output"].tolist() == [[3 * round_]]
        assert (result.request_id, result.model_name, result.model_version) == (f"r{round_}", "times", "1")


def test_strings_travel_and_sizes_vary(client):
    for text in ("", "grün", "x" * 100_000):
        result = client.infer("text", {"input": np.array([[text, "b"]])})
        assert result.outputs["output"].tolist() == [[text.encode(), b"b"]]


def test_large_tensors_travel_whole(client):
    sent = np.random.default_rng(1).random((300, 1001), np.float32)
    assert (client.infer("plus", {"input": sent}).outputs["output"] == sent + 1).all()


def test_what_the_daemon_refuses_keeps_the_connection(client):
    with pytest.raises(NotFound):
        client.infer("none", row(1))
    with pytest.raises(InvalidRequest, match="FP32"):
        client.infer("plus", {"input": np.ones((1, 1))})
    with pytest.raises(Unavailable):
        client.infer("slow", FOR_EVER, timeout_s=0.05)
    assert client.infer("plus", row(1)).outputs["output"].tolist() == [[2]]
    assert len(client._pool._all) == 1


def test_many_threads_share_a_small_pool(node):
    wrong = []
    with Client(node.socket, max_connections=3) as client:

        def work(number):
            for value in range(40):
                model, expected = ("plus", value + 1) if (number + value) % 2 else ("times", value * 3)
                if client.infer(model, row(value, number)).outputs["output"][0, 0] != expected:
                    wrong.append((number, value))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(client._pool._all) == 3


def test_a_thread_that_finds_all_connections_busy_waits_no_longer_than_its_time(node):
    with Client(node.socket, max_connections=1) as client:

        def occupy():
            with pytest.raises(Unavailable):
                client.infer("slow", FOR_EVER, timeout_s=1)

        busy = threading.Thread(target=occupy)
        busy.start()
        while client._pool._all == [] or client._pool._idle:
            pass
        client._timeout_s = 0.05
        with pytest.raises(DeadlineExceeded, match="busy"):
            client.get("/v2")
        busy.join()


def test_close_ends_connections_in_use_after_their_call_and_the_client_goes_on(client):
    client.get("/v2")
    client.close()
    assert client._pool._idle[0]._sock is None
    assert client.get("/v2")["name"] == "skerry"


def test_any_page_with_json_can_be_read_lists_included(client):
    assert client.get("/v2/systemsharedmemory/status") == []
    index = client.post("/v2/repository/index", {"ready": True})
    assert "plus" in [entry["name"] for entry in index]


def test_a_forked_child_uses_connections_of_its_own(client):
    assert client.infer("plus", row(1)).outputs["output"].tolist() == [[2]]
    inherited = client._pool._idle[0]._sock.fileno()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(inherited)
            right = [client.infer("times", row(v)).outputs["output"][0, 0] == 3 * v for v in range(20)]
            status = 0 if all(right) else 2
        finally:
            os._exit(status)
    for value in range(20):
        assert client.infer("plus", row(value)).outputs["output"].tolist() == [[value + 1]]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_while_another_thread_holds_the_pool_does_not_hang_the_child(client):
    client._pool._lock.acquire()
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if client.server_live() else 1)
    finally:
        client._pool._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_daemon_may_restart_between_two_calls(node):
    with Client(node.socket, retries=50) as client, Client(node.socket) as other:
        assert client.infer("plus", row(1)).outputs["output"].tolist() == [[2]]
        assert other.server_ready()
        node.stop()
        starter = threading.Thread(target=node.start)
        starter.start()
        assert client.get("/v2")["name"] == "skerry"
        starter.join()
        assert client.infer("plus", row(5)).outputs["output"].tolist() == [[6]]
        assert other.infer("plus", row(5)).outputs["output"].tolist() == [[6]]


def test_tasks_share_a_small_pool_and_keep_their_answers_apart(node):
    async def main():
        async with AsyncClient(node.socket, max_connections=4) as client:
            asked = [client.infer(("plus", "times")[v % 2], row(v)) for v in range(60)]
            results = await asyncio.gather(*asked)
            found = [result.outputs["output"][0, 0] for result in results]
            assert found == [v * 3 if v % 2 else v + 1 for v in range(60)]
            assert client._pool._made == 4
            large = np.random.default_rng(1).random((300, 1001), np.float32)
            assert ((await client.infer("plus", {"input": large})).outputs["output"] == large + 1).all()
            assert await client.server_ready()
            assert not await client.model_ready("none")
            with pytest.raises(NotFound):
                await client.model_metadata("none")

    asyncio.run(main())


def canceled_runs(node):
    """How many requests to the slow model were given up by their clients."""
    lines = node.get("/metrics")[1].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if 'model="slow"' in line and "CANCELED" in line)


def test_a_cancelled_task_stops_the_run_and_the_client_goes_on(node, client):
    before = canceled_runs(node)

    async def main():
        async with AsyncClient(node.socket, max_connections=1) as waiting:
            task = asyncio.ensure_future(waiting.infer("slow", FOR_EVER))
            second = asyncio.ensure_future(waiting.infer("plus", row(1)))
            await asyncio.sleep(0.1)
            assert not second.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await second).outputs["output"].tolist() == [[2]]

    asyncio.run(main())
    while canceled_runs(node) == before:
        time.sleep(0.02)
    assert client.infer("slow", {"iterations": np.array([2])}).outputs["output"].tolist() == [2]


def test_cancelling_a_task_that_waits_for_a_connection_costs_nobody_theirs(node):
    async def main():
        async with AsyncClient(node.socket, max_connections=1) as client:
            tasks = [asyncio.ensure_future(client.infer("plus", row(v))) for v in range(9)]
            await asyncio.sleep(0)
            for task in tasks[1::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [r.outputs["output"][0, 0] for r in results[::2]] == [1, 3, 5, 7, 9]
            assert all(isinstance(r, asyncio.CancelledError) for r in results[1::2])
            assert (await client.infer("plus", row(1))).outputs["output"].tolist() == [[2]]

    asyncio.run(main())


def test_a_client_belongs_to_one_loop():
    async def make():
        client = AsyncClient("/nowhere")
        assert not await client.server_live()
        return client

    client = asyncio.run(make())
    with pytest.raises(InvalidRequest, match="event loop"):
        asyncio.run(client.get("/v2"))


def test_tcp_works_like_the_socket():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def ask_async():
        async with AsyncClient(f"http://127.0.0.1:{port}") as client:
            return (await client.infer("plus", row(7))).outputs["output"].tolist()

    with temporary_node() as node:
        node.configure(f"ipc: {{tcp: '127.0.0.1:{port}'}}\n")
        node.add(zoo.add(1), "plus")
        node.start()
        with Client(f"http://localhost:{port}/") as client:
            assert client.infer("plus", row(5)).outputs["output"].tolist() == [[6]]
        assert asyncio.run(ask_async()) == [[8]]


ONLY_NUMPY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in sys.stdlib_module_names | {"numpy", "skerry"} and root[0] != "_":
            raise ImportError(f"{name} is neither numpy's nor the standard library's")

sys.meta_path.insert(0, Blocker())
import asyncio, numpy as np
from skerry import AsyncClient, Client

x = {"input": np.ones((1, 2), np.float32)}
with Client(sys.argv[1], shared_memory=True) as client:
    assert client.infer("plus", x).outputs["output"].tolist() == [[2, 2]]

async def main():
    async with AsyncClient(sys.argv[1], shared_memory=True) as client:
        assert (await client.infer("plus", x)).outputs["output"].tolist() == [[2, 2]]

asyncio.run(main())
assert "msgspec" not in sys.modules
"""


def test_numpy_and_the_standard_library_are_all_it_needs(node):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ONLY_NUMPY, str(node.socket)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_shared_memory_of_a_daemon_that_serves_it(node):
    with Client(node.socket, shared_memory=True) as client:
        if "system_shared_memory" not in client.get("/v2")["extensions"]:
            pytest.skip("this daemon does not announce the extension system_shared_memory in GET /v2")
        born = client.array((100, 1000), np.float32)
        for value in (1, 2, 3):
            born[:] = value
            plus = client.infer("plus", {"input": born}).outputs["output"]
            times = client.infer("times", {"input": plus}).outputs["output"]
            assert (plus == value + 1).all()
            assert (times == 3 * (value + 1)).all()
        assert client.shared_memory_active
        small = client.infer("plus", row(1)).outputs["output"]
        assert small.tolist() == [[2]]
        node.stop()
        node.start()
        born[:] = 9
        assert (client.infer("plus", {"input": born}).outputs["output"] == 10).all()
        with pytest.raises(Unavailable):
            client.infer("slow", FOR_EVER, timeout_s=0.05)


def test_a_daemon_without_shared_memory_is_served_through_the_socket(node):
    with Client(node.socket, shared_memory=True) as client:
        if "system_shared_memory" in client.get("/v2")["extensions"]:
            pytest.skip("this daemon serves shared memory")
        born = client.array((100, 1000), np.float32)
        assert (client.infer("plus", {"input": born}).outputs["output"] == 1).all()
        assert not client.shared_memory_active
        assert client.shared_memory_refusal
