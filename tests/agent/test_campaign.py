"""Hundreds of damaged models, signed and loaded one after another in one daemon."""

import random

import onnx
import pytest
import zoo
from node import temporary_node
from traffic import Traffic, infer, number, ready, row

MODELS = 300
FLIPS = 8


def originals():
    return [
        zoo.magika_model().read_bytes(),
        zoo.mlp(),
        zoo.int32_div(),
        zoo.slow_model(16),
        zoo.two_outputs(),
        zoo.big_output(),
        zoo.identity("BYTES"),
        zoo.function_bomb(6),
        zoo.deep_nesting(4),
    ]


def mutated(data, random_source):
    """A few bits flipped, mostly in the first kilobytes, where the structure of a small model lies."""
    octets = bytearray(data)
    reach = random_source.choice([64, 512, 4096, len(octets)])
    for _ in range(random_source.randint(1, FLIPS)):
        octets[random_source.randrange(min(reach, len(octets)))] ^= 1 << random_source.randrange(8)
    return bytes(octets)


def small_request(found):
    """Ones of the smallest shape that the inputs allow; None where that would be a large one."""
    inputs = {}
    for tensor in found["inputs"]:
        size = 1
        for dimension in tensor["shape"]:
            size *= abs(dimension) or 1
        if size > 4096:
            return None
        value = {"BOOL": True, "BYTES": "x"}.get(tensor["datatype"], 1)
        values = value
        for dimension in reversed(tensor["shape"]):
            values = [values] * abs(dimension)
        inputs[tensor["name"]] = (tensor["datatype"], values)
    return inputs


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_damaged_model_takes_the_daemon_or_its_neighbour_down():
    random_source = random.Random(20261)
    models = originals()
    for data in models:
        onnx.load_from_string(data)  # so that what is refused later was made bad here
    outcomes = {"READY": 0, "UNAVAILABLE": 0}
    with temporary_node() as node:
        node.configure("workers:\n  load_timeout: 5s\ninference:\n  timeout: 2s\n")
        node.add(zoo.add(1), "neighbour")
        node.start()
        daemon = node.child
        rss_bytes = node.get("/skerry/v1/status")[1]["rss_bytes"]
        pid = ready(node, "neighbour")["pid"]
        with Traffic(lambda: number(node, "neighbour"), threads=1, pause_s=0.005) as neighbour:
            for version in range(1, MODELS + 1):
                node.add(
                    mutated(random_source.choice(models), random_source),
                    "fuzzed",
                    version,
                    limits={"memory": "512MiB"},
                )
                node.refresh()
                found = row(node, "fuzzed", version)
                outcomes[found["state"]] += 1
                assert (found["state"] == "READY") == (not found["reason"])
                if found["state"] == "READY":
                    inputs = small_request(node.get("/v2/models/fuzzed")[1])
                    if inputs is not None:
                        status, answer = infer(node, "fuzzed", inputs)
                        assert status == 200 or answer["error"]
                node.registry.remove("fuzzed")
                node.refresh()
                assert daemon.poll() is None
            neighbour.more()
        assert neighbour.failures == []
        assert row(node, "neighbour")["pid"] == pid
        assert node.get("/skerry/v1/status")[1]["rss_bytes"] < rss_bytes + (32 << 20)
        assert "Traceback" not in node.log.read_text()
        assert node.stop() == 0
    assert min(outcomes.values()) > MODELS // 20  # the damage is neither harmless nor total
