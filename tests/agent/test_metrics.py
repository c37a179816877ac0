"""The metrics page, read by a parser of its own that knows the text format and nothing of Skerry."""

import math
import re
from types import SimpleNamespace

import pytest
import zoo
from node import temporary_node

from agent import metrics
from agent.stats import Statistics

SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"')
KINDS = {"counter", "gauge", "histogram", "summary", "untyped"}
DATA = [1.0, 2.0]
REQUEST = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 2], "data": DATA}]}


def parse(text):
    """Prometheus text -> {(name, frozenset of labels): value}; whatever breaks the format is an AssertionError."""
    assert text.endswith("\n")
    samples, helped, kinds, family = {}, set(), {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, family, meaning = line.split(" ", 3)
            assert meaning
            assert family not in helped
            helped.add(family)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family
            assert kind in KINDS
            assert name not in kinds
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match["name"] == family  # samples of a family stand together, below its type
            assert family in kinds
            labels = LABEL.findall(match["labels"] or "")
            assert ",".join(f'{name}="{value}"' for name, value in labels) == (match["labels"] or "")
            key = (match["name"], frozenset(labels))
            assert key not in samples
            samples[key] = float(match["value"])
            assert math.isfinite(samples[key])
            assert kinds[family] != "counter" or samples[key] >= 0
    assert kinds.keys() == helped
    return samples


def version(name, number, **counted):
    stats = Statistics()
    for field, value in counted.items():
        setattr(stats, field, value)
    return SimpleNamespace(
        name=name, number=number, stats=stats, instance=None, load_s=None, state="READY", crashes=[]
    )


def value(samples, name, model=None, number="1", **labels):
    if model is not None:
        labels |= {"model": model, "version": number}
    return samples[name, frozenset(labels.items())]


# --- the text


def test_every_version_has_samples_of_its_own():
    samples = parse(
        metrics.render([version("a", 1, success=3), version("a", 2, success=4), version("b.c-d_e", 1)])
    )
    assert value(samples, "nv_inference_request_success", "a", "1") == 3
    assert value(samples, "nv_inference_request_success", "a", "2") == 4
    assert value(samples, "nv_inference_request_success", "b.c-d_e", "1") == 0
    assert value(samples, "skerry_model_ready", "a", "2") == 1


def test_failures_are_told_apart_by_reason():
    samples = parse(metrics.render([version("a", 1, rejected=1, canceled=2, failed=3)]))
    for reason, count in (("REJECTED", 1), ("CANCELED", 2), ("BACKEND", 3)):
        assert value(samples, "nv_inference_request_failure", "a", reason=reason) == count


def test_a_node_without_models_still_has_well_formed_metrics():
    samples = parse(metrics.render([], [("skerry_up", "gauge", "Always 1", 1)]))
    assert samples == {("skerry_up", frozenset()): 1}


def test_a_version_that_was_never_loaded_has_no_load_time():
    samples = parse(metrics.render([version("a", 1)]))
    assert not [name for name, _ in samples if name == "nv_model_load_duration_secs"]


@pytest.mark.parametrize("count", [10**14 + 1, 123456789012345])
def test_large_counters_are_exact(count):
    samples = parse(metrics.render([version("a", 1, request_us=count)]))
    assert value(samples, "nv_inference_request_duration_us", "a") == count


# --- what a daemon counts


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.add(zoo.add(1), "plain")
        node.add(zoo.scale(3), "cached", cache={"policy": "exact", "scope": "shared"})
        node.add(zoo.int32_div(), "div")
        yield node.start()


def read(node):
    status, headers, body = node.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    return parse(body.decode())


def test_requests_runs_and_cache_hits_are_counted_where_they_belong(node):
    before = read(node)
    never_asked = {"inputs": [{**REQUEST["inputs"][0], "data": [3.0, 4.0]}]}
    for name, times in (("plain", 3), ("cached", 4)):
        for _ in range(times):
            assert node.post(f"/v2/models/{name}/infer", never_asked)[0] == 200
    after = read(node)

    def grown(name, model, **labels):
        return value(after, name, model, **labels) - value(before, name, model, **labels)

    assert [grown("nv_inference_request_success", model) for model in ("plain", "cached", "div")] == [3, 4, 0]
    assert [grown("nv_inference_count", model) for model in ("plain", "cached")] == [3, 1]
    assert [grown("nv_inference_exec_count", model) for model in ("plain", "cached")] == [3, 1]
    assert [grown("nv_cache_num_hits_per_model", model) for model in ("plain", "cached")] == [0, 3]
    assert [grown("nv_cache_num_misses_per_model", model) for model in ("plain", "cached")] == [0, 1]
    assert grown("nv_inference_compute_infer_duration_us", "plain") > 0
    for model in ("plain", "cached"):
        request_us = grown("nv_inference_request_duration_us", model)
        assert request_us >= grown("nv_inference_compute_infer_duration_us", model)
        assert request_us > 0
        assert value(after, "nv_model_load_duration_secs", model) > 0
        assert value(after, "nv_inference_pending_request_count", model) == 0


def test_a_run_that_fails_is_counted_as_the_backends(node):
    def pair(y):
        return {
            "inputs": [
                {"name": "x", "datatype": "INT32", "shape": [1], "data": [6]},
                {"name": "y", "datatype": "INT32", "shape": [1], "data": [y]},
            ]
        }

    before = read(node)
    assert node.post("/v2/models/div/infer", pair(0))[0] >= 400
    assert node.post("/v2/models/div/infer", pair(2))[0] == 200
    after = read(node)
    failure = ("nv_inference_request_failure", "div")
    assert value(after, *failure, reason="BACKEND") - value(before, *failure, reason="BACKEND") == 1
    success = ("nv_inference_request_success", "div")
    assert value(after, *success) - value(before, *success) == 1


def test_no_counter_ever_falls(node):
    before = read(node)
    node.post("/v2/models/plain/infer", REQUEST)
    node.post("/v2/models/plain/infer", {"inputs": []})
    node.post("/v2/models/cached/infer", REQUEST)
    after = read(node)
    assert before.keys() <= after.keys()
    falls = [key for key in before if after[key] < before[key]]
    assert not [name for name, _ in falls if "bytes" not in name and "pending" not in name]
