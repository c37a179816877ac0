"""Priorities, batches and runners as a client of the socket meets them."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zoo
from node import temporary_node
from traffic import ENDLESS, answer_of, begin_work, body, infer, until, work

from skerry.errors import SkerryError

LAYER_ROWS = np.random.default_rng(1).standard_normal((4, 1, 32, 512)).astype(np.float32)


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.add(zoo.slow_model(64), "slow", instances=1)
        node.add(zoo.mlp(), "mlp")
        node.add(zoo.mlp(), "unbatched", batching={"max_batch_size": 1})
        node.add(zoo.mlp(), "gathered", batching={"max_batch_size": 2, "max_queue_delay_us": 500_000})
        node.add(zoo.layers(), "layers", batching={"max_batch_size": 8}, instances=2)
        node.start()
        for name in ("slow", "mlp", "unbatched", "gathered", "layers"):
            until(lambda name=name: node.table()[name, "1"]["state"] == "READY", name)
        yield node


def step(node, model):
    status, record = node.get(f"/skerry/v1/models/{model}/placement")
    assert status == 200
    return record["steps"][record["accepted"]]


def counted(node, model, name):
    text = node.get("/metrics")[1].decode()
    return next(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(f'{name}{{model="{model}"')
    )


def begin(node, iterations, **parameters):
    """Like begin_work, with parameters."""
    content = json.dumps(body({"iterations": ("INT64", [iterations])}, **parameters)).encode()
    sock = node.connect()
    head = b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
    sock.sendall(head + content)
    return sock


def test_the_schedule_policy_is_announced(node):
    assert "schedule_policy" in node.get("/v2")[1]["extensions"]


@pytest.mark.parametrize("priority", [-1, 17, 2**70, 1.0, True, "1", None, [1]])
def test_a_priority_that_is_none_is_refused_with_what_there_is(priority, node):
    status, answer = infer(node, "slow", {"iterations": ("INT64", [1])}, priority=priority)
    assert status == 400
    assert "parameter 'priority': expected 0 (the default) or 1 to 16, got" in answer["error"]


@pytest.mark.parametrize("priority", [0, 1, 16])
def test_priorities_that_are_some_are_taken(priority, node):
    assert work(node, 2, priority=priority) == (200, 2.0)


def test_what_is_more_important_is_answered_first_when_the_worker_is_free_again(node):
    def waiting(count):
        until(
            lambda: counted(node, "slow", "nv_inference_pending_request_count") == count, f"{count} waiting"
        )

    with begin_work(node, ENDLESS) as one, begin_work(node, ENDLESS) as two:
        waiting(2)  # one runs, one is in the worker behind it; what comes now waits in the daemon
        # The less important ones came first, and whoever is behind them is never answered.
        with begin(node, ENDLESS, priority=16), begin(node, ENDLESS), begin(node, 7, priority=1) as first:
            waiting(5)
            one.close()
            two.close()
            assert answer_of(first)[1]["outputs"][0]["data"] == [7.0]
    waiting(0)


def test_requests_that_come_together_run_together_and_answers_are_not_mixed_up(node):
    """Two at a time, in as many rounds as it takes to learn what runs cost and to try one of both."""
    rng = np.random.default_rng(2)
    with node.client() as one, node.client() as two, ThreadPoolExecutor(2) as pool:
        for _ in range(200):
            rows = rng.standard_normal((2, 64)).astype(np.float32)
            asked = [
                pool.submit(client.infer, "gathered", {"input": rows[i : i + 1]})
                for i, client in enumerate((one, two))
            ]
            both = np.concatenate([future.result().outputs["output"] for future in asked])
            expected = one.infer("unbatched", {"input": rows}).outputs["output"]
            np.testing.assert_allclose(both, expected, rtol=1e-3, atol=1e-5)
            runs, requests = (
                counted(node, "gathered", f"nv_inference_{what}count") for what in ("exec_", "")
            )
            if runs < requests:
                break
    assert runs < requests
    runs, rows = (counted(node, "unbatched", f"nv_inference_{what}count") for what in ("exec_", ""))
    assert runs == rows


def test_the_trail_says_how_requests_are_run_and_why(node):
    mlp, unbatched, layers = (step(node, name) for name in ("mlp", "unbatched", "layers"))
    assert (mlp["runners"], mlp["max_batch"]) == (1, 64)
    assert "one run at a time on one thread; batches up to 64 rows" in mlp["why"]
    assert unbatched["max_batch"] == 1
    assert "no batches: the manifest asks for none" in unbatched["why"]
    assert layers["max_batch"] == 8
    assert step(node, "slow")["max_batch"] == 1
    assert "no open first dimension" in step(node, "slow")["why"]


def test_a_heavier_model_answers_many_at_once_each_its_own(node):
    with node.client() as client:
        alone = [client.infer("layers", {"input": rows}).outputs["output"] for rows in LAYER_ROWS]
    got = [None] * 16

    def ask(index):
        try:
            with node.client() as client:
                got[index] = client.infer("layers", {"input": LAYER_ROWS[index % 4]}).outputs["output"]
        except SkerryError as error:
            got[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, output in enumerate(got):
        np.testing.assert_allclose(output, alone[index % 4], rtol=1e-3, atol=1e-5)
