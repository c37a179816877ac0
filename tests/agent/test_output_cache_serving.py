"""Remembered answers as a client sees them: never another model's, another question's, another user's, or a stale one.

The first group are questions that servers are known to answer wrongly from their caches.
"""

import contextlib
import os
import struct
import time

import pytest
import zoo
from node import temporary_node
from wire_http import Conversation, Tensor, effective_user, floats, infer, metrics, pack

BINARY = {"binary_data_output": True}
NOBODY = 65534
MINE = {"policy": "exact", "scope": "uid", "ttl": "1h"}
SHARED = {"policy": "exact", "scope": "shared", "ttl": "1h"}


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        # Room in memory for the largest answers that are asked for here.
        node.configure(
            "ipc:\n  socket_mode: '0666'\naccess:\n  rules: ['allow infer,read uid:*']\ncache:\n  memory: 16MiB\n"
        )
        for name, model in (
            ("plus", zoo.add(1)),
            ("minus", zoo.two_inputs()),
            ("signs", zoo.two_outputs()),
            ("text", zoo.identity("BYTES")),
            ("same-INT32", zoo.identity("INT32")),
            ("same-FP32", zoo.identity("FP32")),
            ("big", zoo.big_output()),
        ):
            node.add(model, name, cache=MINE)
        node.add(zoo.scale(3), "triple", cache=MINE)
        node.add(zoo.add(5), "public", cache=SHARED)
        node.add(zoo.add(6), "uncached")
        node.add(zoo.add(7), "alias-1", cache=MINE)
        node.add(zoo.add(7), "alias-2", cache=MINE)
        node.start()
        for folder in (node.home, node.socket.parent):
            folder.chmod(0o755)
        yield node
        assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


_unused = iter(range(1, 1_000_000))


@pytest.fixture
def fresh():
    """A number that no other test of this module asks about."""
    return float(next(_unused))


def ask(talk, model, inputs, **more):
    """(outputs, whether they were remembered)"""
    response = talk.ask(infer(model, inputs, **more))
    assert response.status == 200, response.body
    parameters = response.json.get("parameters", {})
    assert parameters in ({}, {"cached": True})
    return response.tensors, bool(parameters)


def counted(node, model, version="1"):
    """(hits, misses, runs, successes)"""
    found = metrics(node.get("/metrics")[1].decode())
    labels = (("model", model), ("version", version))
    names = (
        "nv_cache_num_hits_per_model",
        "nv_cache_num_misses_per_model",
        "nv_inference_count",
        "nv_inference_request_success",
    )
    return tuple(found[name, labels] for name in names)


# -- where others answer wrongly


def test_two_models_with_equal_inputs_have_their_own_answers(talk, fresh):
    for cached in (False, True):
        assert ask(talk, "plus", [floats(fresh)]) == ({"output": [fresh + 1]}, cached)
        assert ask(talk, "triple", [floats(fresh)]) == ({"output": [fresh * 3]}, cached)


def test_equal_bytes_in_another_shape_are_another_question(talk, fresh):
    values = (fresh, 2.0, 3.0, 4.0)
    for cached in (False, True):
        for shape in ((1, 4), (2, 2), (4, 1)):
            response = talk.ask(infer("plus", [floats(*values, shape=shape, binary=True)]))
            assert response.json["outputs"][0]["shape"] == list(shape)
            assert ("parameters" in response.json) is cached


def test_equal_bytes_of_another_datatype_are_another_question(talk, fresh):
    raw = struct.pack("<4f", fresh, 1.0, 2.0, 3.0)
    for cached in (False, True):
        for datatype in ("INT32", "FP32"):
            sent = Tensor("input", datatype, (1, 4), raw)
            response = talk.ask(infer(f"same-{datatype}", [sent], parameters=BINARY))
            assert response.json["outputs"][0]["datatype"] == datatype
            assert response.body.endswith(raw)
            assert ("parameters" in response.json) is cached
    # And the model that takes the one refuses the other, remembered or not.
    refused = talk.ask(infer("same-INT32", [Tensor("input", "FP32", (1, 4), raw)]))
    assert refused.status == 400


def test_an_id_is_no_part_of_the_question_and_every_answer_has_its_own(talk, fresh):
    for cached, id_ in ((False, "one"), (True, "two"), (True, None), (True, "one")):
        more = {} if id_ is None else {"id": id_}
        response = talk.ask(infer("plus", [floats(fresh)], **more))
        assert response.json.get("id") == id_
        assert ("parameters" in response.json) is cached
        assert response.tensors == {"output": [fresh + 1]}


def test_inputs_that_trade_their_values_are_another_question(talk, fresh):
    def given(a, b):
        return [floats(a, name="a", binary=True), floats(b, name="b", binary=True)]

    big, small = fresh + 0.5, fresh
    assert ask(talk, "minus", given(big, small)) == ({"difference": [0.5]}, False)
    assert ask(talk, "minus", given(small, big)) == ({"difference": [-0.5]}, False)
    # The order in which they are sent changes nothing, neither the answer nor that it is known.
    assert ask(talk, "minus", given(big, small)[::-1]) == ({"difference": [0.5]}, True)
    assert ask(talk, "minus", given(small, big)[::-1]) == ({"difference": [-0.5]}, True)


def test_strings_with_other_boundaries_are_another_question(talk, fresh):
    one, other = [b"ab", b"c%d" % fresh], [b"a", b"bc%d" % fresh]
    for cached in (False, True):
        for strings in (one, other):
            sent = Tensor("input", "BYTES", (1, 2), strings)
            assert ask(talk, "text", [sent], parameters=BINARY) == ({"output": strings}, cached)


def test_other_outputs_or_another_order_of_them_are_another_question(talk, fresh):
    everything = {"negated": [-fresh], "positive": [True]}
    for cached in (False, True):
        for wanted in (None, ["positive"], ["negated"], ["positive", "negated"]):
            outputs = None if wanted is None else [{"name": name} for name in wanted]
            answer, was_cached = ask(talk, "signs", [floats(fresh)], outputs=outputs)
            assert list(answer.items()) == [(name, everything[name]) for name in wanted or everything]
            assert was_cached is cached


def test_a_new_version_never_gives_the_old_ones_answers(node, talk, fresh):
    node.add(zoo.add(10), "growing", cache=MINE)
    node.refresh()
    assert ask(talk, "growing", [floats(fresh)]) == ({"output": [fresh + 10]}, False)
    assert ask(talk, "growing", [floats(fresh)]) == ({"output": [fresh + 10]}, True)
    node.add(zoo.add(20), "growing", cache=MINE)
    node.refresh()
    for cached in (False, True):
        response = talk.ask(infer("growing", [floats(fresh)]))
        assert (response.json["model_version"], response.tensors) == ("2", {"output": [fresh + 20]})
        assert ("parameters" in response.json) is cached


def test_an_equal_model_of_another_name_or_version_answers_in_its_own_name(node, talk, fresh):
    for name in ("alias-1", "alias-2", "alias-1"):
        response = talk.ask(infer(name, [floats(fresh)]))
        assert (response.json["model_name"], response.json["model_version"]) == (name, "1")
        assert response.tensors == {"output": [fresh + 7]}
    node.add(zoo.add(7), "alias-1", cache=MINE)
    node.refresh()
    response = talk.ask(infer("alias-1", [floats(fresh)]))
    assert (response.json["model_version"], response.tensors) == ("2", {"output": [fresh + 7]})


# -- whose answers


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@contextlib.contextmanager
def stranger(node):
    with effective_user(NOBODY):
        talk = Conversation(node.socket)
    with talk:
        yield talk


@only_root
def test_nobody_can_tell_what_another_user_has_asked(node, talk, fresh):
    assert ask(talk, "plus", [floats(fresh)])[1] is False
    assert ask(talk, "plus", [floats(fresh)])[1] is True
    with stranger(node) as other:
        assert ask(other, "plus", [floats(fresh)]) == ({"output": [fresh + 1]}, False)
        assert ask(other, "plus", [floats(fresh)]) == ({"output": [fresh + 1]}, True)


@only_root
def test_users_share_answers_where_the_manifest_says_so(node, talk, fresh):
    assert ask(talk, "public", [floats(fresh)])[1] is False
    with stranger(node) as other:
        assert ask(other, "public", [floats(fresh)]) == ({"output": [fresh + 5]}, True)


def test_connections_of_one_user_share_answers(node, talk, fresh):
    assert ask(talk, "plus", [floats(fresh)])[1] is False
    with Conversation(node.socket) as other:
        assert ask(other, "plus", [floats(fresh)])[1] is True


# -- how it is told and counted


def test_hits_are_marked_and_counted_and_the_model_does_not_run(node, talk, fresh):
    before = counted(node, "plus")
    table = node.table()["plus", "1"]
    for index in range(5):
        assert ask(talk, "plus", [floats(fresh)]) == ({"output": [fresh + 1]}, index > 0)
    after = counted(node, "plus")
    assert [now - then for now, then in zip(after, before, strict=True)] == [4, 1, 1, 5]
    row = node.table()["plus", "1"]
    assert row["cache_hits"] - table["cache_hits"] == 4
    assert row["cache_misses"] - table["cache_misses"] == 1


def test_a_model_without_a_cache_policy_is_always_asked(node, talk, fresh):
    for _ in range(3):
        assert ask(talk, "uncached", [floats(fresh)]) == ({"output": [fresh + 6]}, False)
    hits, misses, runs, _ = counted(node, "uncached")
    assert (hits, misses) == (0, 0)
    assert runs >= 3
    assert node.get("/v2/models/uncached/config")[1]["response_cache"] == {"enable": False}
    assert node.get("/v2/models/plus/config")[1]["response_cache"] == {"enable": True}


def test_the_form_in_which_it_is_asked_and_answered_does_not_matter(talk, fresh):
    expected = {"output": [fresh + 1]}
    assert ask(talk, "plus", [floats(fresh, binary=True)]) == (expected, False)
    assert ask(talk, "plus", [floats(fresh)]) == (expected, True)
    assert ask(talk, "plus", [floats(fresh)], parameters=BINARY) == (expected, True)
    response = talk.ask(infer("plus", [floats(fresh, binary=True)], parameters=BINARY, id="x"))
    assert response.body.endswith(pack("FP32", [fresh + 1]))
    assert (response.json["id"], response.json["parameters"]) == ("x", {"cached": True})


def test_wrong_requests_are_refused_as_ever_and_nothing_is_remembered_of_them(node, talk, fresh):
    before = counted(node, "plus")
    for _ in range(2):
        assert talk.ask(infer("plus", [floats(fresh, name="x")])).status == 400
    assert counted(node, "plus") == before


def test_an_answer_that_json_cannot_carry_is_refused_each_time_and_found_as_binary(talk, fresh):
    sent = Tensor("input", "FP32", (1, 2), [fresh, float("inf")])
    for _ in range(2):
        assert talk.ask(infer("same-FP32", [sent])).status == 400
    assert ask(talk, "same-FP32", [sent], parameters=BINARY) == ({"output": [fresh, float("inf")]}, True)


@pytest.mark.parametrize("size", [0, 100_000, 1_000_000])
def test_answers_of_any_size_are_remembered_whole(talk, size, fresh):
    size += int(fresh)
    for cached in (False, True, True):
        response = talk.ask(infer("big", [Tensor("n", "INT64", [1], [size])], parameters=BINARY))
        assert response.body[-size:] == bytes(size)
        assert ("parameters" in response.json) is cached


def test_an_answer_that_is_too_large_to_keep_is_right_each_time(talk):
    size = 33 << 20  # an eighth of what the file may hold is too much
    for _ in range(2):
        response = talk.ask(infer("big", [Tensor("n", "INT64", [1], [size])], parameters=BINARY))
        assert response.body[-size:] == bytes(size)
        assert "parameters" not in response.json


# -- how long


def test_an_answer_is_forgotten_after_its_time_however_often_it_is_asked_for(node, talk, fresh):
    node.add(zoo.add(30), "brief", cache={**MINE, "ttl": "500ms"})
    node.refresh()
    assert ask(talk, "brief", [floats(fresh)]) == ({"output": [fresh + 30]}, False)
    assert ask(talk, "plus", [floats(fresh)])[1] is False
    until = time.monotonic() + 20
    while ask(talk, "brief", [floats(fresh)]) == ({"output": [fresh + 30]}, True):
        assert time.monotonic() < until, "asking keeps it alive"
        time.sleep(0.01)
    assert counted(node, "brief")[1] == 2
    assert ask(talk, "plus", [floats(fresh)])[1] is True


def test_a_removed_models_answers_do_not_come_back_with_it(node, talk, fresh):
    node.add(zoo.add(40), "passing", cache=MINE)
    node.refresh()
    assert ask(talk, "passing", [floats(fresh)])[1] is False
    assert ask(talk, "passing", [floats(fresh)])[1] is True
    node.registry.remove("passing")
    node.refresh()
    assert talk.ask(infer("passing", [floats(fresh)])).status == 404
    node.add(zoo.add(40), "passing", cache=MINE)
    node.refresh()
    assert ask(talk, "passing", [floats(fresh)]) == ({"output": [fresh + 40]}, False)


@pytest.fixture
def restarted():
    """A node that has answered once, and was stopped."""
    with temporary_node() as node:
        node.add(zoo.add(1), "plus", cache=MINE)
        node.add(zoo.scale(3), "triple", cache=MINE)
        node.start()
        with Conversation(node.socket) as talk:
            assert ask(talk, "plus", [floats(5)]) == ({"output": [6.0]}, False)
        assert node.stop() == 0
        yield node


def test_answers_survive_a_restart(restarted):
    restarted.start()
    with Conversation(restarted.socket) as talk:
        assert ask(talk, "plus", [floats(5)]) == ({"output": [6.0]}, True)
        assert ask(talk, "triple", [floats(5)]) == ({"output": [15.0]}, False)
        assert ask(talk, "plus", [floats(6)]) == ({"output": [7.0]}, False)
    assert restarted.stop() == 0


@pytest.mark.parametrize("damage", ["garbage", "half", "empty"])
def test_a_damaged_cache_is_set_aside_and_a_new_one_begun(restarted, damage):
    path = restarted.home / "cache.db"
    whole = path.read_bytes()
    broken = {"garbage": os.urandom(len(whole)), "half": whole[: len(whole) // 2], "empty": b""}
    for leftover in restarted.home.glob("cache.db*"):
        leftover.unlink()
    path.write_bytes(broken[damage])
    restarted.start()
    with Conversation(restarted.socket) as talk:
        answer, cached = ask(talk, "plus", [floats(5)])
        assert answer == {"output": [6.0]}
        assert not cached or damage == "half", "half a file may hold the whole answer"
        assert ask(talk, "plus", [floats(5)]) == ({"output": [6.0]}, True)
    assert restarted.stop() == 0
    if damage == "garbage":
        aside = [file for file in restarted.home.glob("cache.db*") if file.read_bytes() == broken[damage]]
        assert len(aside) == 1, "kept for whoever wants to know"
        assert aside[0] != path
    restarted.start()
    with Conversation(restarted.socket) as talk:
        assert ask(talk, "plus", [floats(5)]) == ({"output": [6.0]}, True)
    assert restarted.stop() == 0


def test_where_no_cache_can_be_kept_answers_are_right_and_the_operator_is_told(restarted):
    for leftover in restarted.home.glob("cache.db*"):
        leftover.unlink()
    (restarted.home / "cache.db" / "inside").mkdir(parents=True)
    restarted.start()
    with Conversation(restarted.socket) as talk:
        for _ in range(2):
            assert ask(talk, "plus", [floats(5)]) == ({"output": [6.0]}, False)
    (warning,) = restarted.get("/skerry/v1/status")[1]["warnings"]
    assert warning.startswith("no output cache: ")
    assert restarted.stop() == 0
