"""When a node says that it is ready, and that nothing takes this back."""

import threading

import pytest
import zoo
from node import temporary_node

PATIENCE_S = 2


@pytest.fixture
def node():
    with temporary_node() as node:
        node.configure(f"workers:\n  load_timeout: {PATIENCE_S}s\n")
        yield node


def states(node):
    return {(row["name"], row["version"]): row["state"] for row in node.post("/v2/repository/index")[1]}


def is_ready(node):
    return node.get("/v2/health/ready") == (200, {"ready": True})


def test_probes_without_end_hold_a_node_up_no_longer_than_one_load_may_take(node):
    # Few are loaded at a time, so all of them together take many times as long as one.
    for number in range(12):
        node.add(zoo.endless_loop(), f"endless-{number}")
    node.add(zoo.add(1), "a-good-one")
    node.start()
    found = states(node)
    assert found.pop(("a-good-one", "1")) == "READY"
    assert "LOADING" in found.values()
    assert "READY" not in found.values()
    assert is_ready(node)


def test_bad_arrivals_and_unloading_leave_a_ready_node_ready(node):
    node.add(zoo.add(1), "good")
    node.start()
    node.add(zoo.endless_loop(), "endless")
    node.add(zoo.garbage(), "good", 2)
    refresh = threading.Thread(target=node.refresh)
    refresh.start()
    while states(node).get(("endless", "1")) != "LOADING":
        assert is_ready(node)
    while refresh.is_alive():
        assert is_ready(node)
        refresh.join(0.05)
    found = states(node)
    assert (found["endless", "1"], found["good", "1"]) == ("UNAVAILABLE", "READY")
    assert b"\nskerry_ready 1\n" in node.get("/metrics")[1]
    assert node.post("/v2/repository/models/good/unload") == (200, {})
    assert (states(node)["good", "1"], is_ready(node)) == ("UNAVAILABLE", True)
    node.registry.remove("endless", 1)
    node.stop()
    node.start()
    assert states(node)["good", "1"] == "READY"  # what is unloaded is so until the next start


def test_status_counts_models_not_their_versions(node):
    node.configure("models:\n  load: lazy\n")
    for version in (1, 2):
        node.add(zoo.add(version), "both", version, versions="all")
    node.add(zoo.add(3), "sleeper")
    node.start()

    def counted():
        return tuple(node.get("/skerry/v1/status")[1]["models"][key] for key in ("ready", "asleep", "total"))

    assert counted() == (0, 2, 2)
    assert node.post("/v2/repository/models/both/load")[0] == 200  # loads both versions
    assert states(node)["both", "1"] == states(node)["both", "2"] == "READY"
    assert counted() == (1, 1, 2)
