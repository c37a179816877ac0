"""Rules, quotas and the admin socket, on a real daemon: who gets what, who is refused, and what others notice of it."""

import contextlib
import itertools
import json
import os
import time

import pytest
import zoo
from node import temporary_node
from patience import eventually
from wire_http import Conversation, Tensor, effective_user, floats, http, infer, metrics

from agent.ipc import routes
from agent.ipc.routes import Page

NOBODY, OTHER = 65534, 65533
MARKS = itertools.count(100_000)
BODY = 8 << 20
CONFIG = """
log: {level: info}
ipc:
  socket_mode: '0666'
  body_timeout: 20s
access:
  rules:
"""
RULES = f"""\
    - deny infer uid:{NOBODY} model:secret
    - allow infer,read uid:{NOBODY}
    - allow infer,read uid:{OTHER} model:plus
    - allow admin uid:{OTHER} model:plus
"""

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
GET_LIVE = http("GET", "/v2/health/live")
REFRESH = http("POST", "/skerry/v1/registry/refresh", b"")


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure(CONFIG + RULES)
        for folder in (node.home, node.home / "run"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
        node.add(zoo.add(1), "plus")
        node.add(zoo.add(2), "secret")
        node.add(zoo.identity("UINT8"), "same")
        node.add(zoo.add(3), "metered", limits={"rate": 2})
        node.admin = node.socket.with_name("admin.sock")
        yield node.start()
        assert node.stop() == 0
        assert not node.admin.exists()
        log = node.log.read_text()
        assert "Traceback" not in log, log


@contextlib.contextmanager
def somebody(node, uid, place=None):
    with effective_user(uid):
        talk = Conversation(place or node.socket)
    with talk:
        yield talk


@contextlib.contextmanager
def configured(node, text):
    """Another configuration for a while. The daemon is told, and says when it has it."""
    settle(node, text)
    try:
        yield
    finally:
        settle(node, CONFIG + RULES)


def settle(node, text):
    # The rules of a file are in force when one that only this file has is: here, for a user that nobody is.
    mark = next(MARKS)
    node.configure(text.replace("  rules:\n", f"  rules:\n    - deny admin uid:{mark}\n"))
    assert eventually(lambda: f"uid:{mark}'" in node.log.read_text())


def refused(response, status):
    assert response.status == status, response.body
    return response.json["error"]


def number(node, name, **labels):
    return metrics(node.get("/metrics")[1].decode())[name, tuple(sorted(labels.items()))]


def test_what_is_asked_with_another_verb_than_get_is_inference_or_administration():
    pages = {page for _, methods in routes._ROUTES for verb, page in methods.items() if verb != "GET"}
    assert pages - routes.ADMINISTRATION == {
        Page.INFER,
        Page.INDEX,
        Page.SHARE,
        Page.UNSHARE,
        Page.CUDA_SHARE,
        Page.CUDA_UNSHARE,
    }


# -- rules


@only_root
def test_a_rule_that_denies_is_named_and_the_model_next_door_answers(node):
    with somebody(node, NOBODY) as talk:
        error = refused(talk.ask(infer("secret", [floats(1)])), 403)
        assert error == (
            f"infer on model secret: expected a user who may, got uid {NOBODY}"
            f" (rule: deny infer uid:{NOBODY} model:secret)"
        )
        assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}
        assert talk.ask(http("GET", "/v2/models/secret")).status == 200, "only inference was denied"
    with Conversation(node.socket) as talk:
        assert talk.ask(infer("secret", [floats(1)])).tensors == {"output": [3.0]}


@only_root
def test_shared_memory_is_for_whoever_may_run_a_model(node):
    status, unregister = "/v2/systemsharedmemory/status", "/v2/systemsharedmemory/unregister"
    with somebody(node, OTHER) as talk:  # who may run one
        assert talk.ask(http("GET", status)).json == []
        assert talk.ask(http("POST", unregister, b"")).status == 200
    with somebody(node, 65532) as talk:  # who may run none
        assert "infer on this node" in refused(talk.ask(http("GET", status)), 403)
        assert refused(talk.ask(http("POST", unregister, b"")), 403)


@only_root
def test_who_may_read_one_model_sees_no_other(node):
    with somebody(node, OTHER) as talk:
        assert talk.ask(http("GET", "/v2/models")).json == {"models": ["plus"]}
        assert [row["name"] for row in talk.ask(http("GET", "/skerry/v1/models")).json["models"]] == ["plus"]
        assert b"secret" not in talk.ask(http("GET", "/metrics")).body
        for page in ("/v2/models/secret", "/v2/models/secret/ready", "/v2/models/none", "/skerry/v1/status"):
            assert "rule: default" in refused(talk.ask(http("GET", page)), 403)
        for page in ("/v2", "/v2/health/live", "/v2/health/ready"):
            assert talk.ask(http("GET", page)).status == 200
        # Whether a model exists is none of their business either.
        assert refused(talk.ask(infer("none", [floats(1)])), 403)


@only_root
def test_administration_may_be_granted_for_one_model(node):
    with somebody(node, OTHER) as talk:
        assert talk.ask(http("POST", "/skerry/v1/models/plus/clear", b"")).status == 200
        refused(talk.ask(http("POST", "/skerry/v1/models/secret/clear", b"")), 403)
        refused(talk.ask(REFRESH), 403)
        refused(talk.ask(http("GET", "/skerry/v1/denials")), 403)


@only_root
def test_a_large_body_that_is_not_allowed_is_read_and_refused_and_the_connection_goes_on(node):
    with somebody(node, NOBODY) as talk:
        big = infer("secret", [Tensor("input", "FP32", (1, 100_000), bytes(400_000))])
        refused(talk.ask(big + infer("plus", [floats(4)])), 403)
        assert talk.response().tensors == {"output": [5.0]}


@only_root
def test_denials_are_counted_and_shown_to_administrators(node):
    before = number(node, "skerry_denied", action="infer")
    with somebody(node, NOBODY) as talk:
        refused(talk.ask(infer("secret", [floats(1)])), 403)
    assert number(node, "skerry_denied", action="infer") == before + 1
    last = node.get("/skerry/v1/denials")[1]["denials"][-1]
    assert last.pop("unix") == pytest.approx(time.time(), abs=60)  # noqa: TID251 - the daemon's stamp is wall time
    assert last == {
        "uid": NOBODY,
        "pid": os.getpid(),
        "door": "main",
        "action": "infer",
        "model": "secret",
        "rule": f"deny infer uid:{NOBODY} model:secret",
    }


@only_root
def test_a_flood_of_denials_is_one_line_in_the_log_and_a_hundred_on_the_page(node):
    before = node.log.read_text().count("denied: uid")
    with somebody(node, OTHER) as talk:
        talk.send(http("GET", "/v2/models/secret") * 300)
        for _ in range(300):
            refused(talk.response(), 403)
    assert len(node.get("/skerry/v1/denials")[1]["denials"]) == 100
    assert node.log.read_text().count("denied: uid") <= before + 2


@only_root
def test_new_rules_hold_on_connections_that_are_open(node):
    with somebody(node, NOBODY) as talk, somebody(node, OTHER) as other:
        assert talk.ask(infer("plus", [floats(1)])).status == 200
        assert other.ask(infer("plus", [floats(1)])).status == 200
        rules = f"    - deny * uid:{NOBODY}\n    - allow infer uid:{OTHER}\n"
        with configured(node, CONFIG + rules):
            assert f"deny * uid:{NOBODY}" in refused(talk.ask(infer("plus", [floats(1)])), 403)
            assert other.ask(infer("secret", [floats(1)])).status == 200
        assert talk.ask(infer("plus", [floats(1)])).status == 200
        refused(other.ask(infer("secret", [floats(1)])), 403)


def test_a_broken_rule_changes_nothing(node):
    node.configure(CONFIG + "    - allow everything\n")
    assert eventually(
        lambda: "expected some of infer, read, admin, or *, got 'everything'" in node.log.read_text()
    )
    with Conversation(node.socket) as talk:
        assert talk.ask(infer("plus", [floats(1)])).status == 200
    settle(node, CONFIG + RULES)


def test_what_an_administrator_did_is_in_the_log(node):
    node.refresh()
    assert f"administration: uid {os.geteuid()}, pid {os.getpid()}: REFRESH" in node.log.read_text()


# -- the admin socket


def test_the_admin_socket_is_for_its_owner_and_answers_everything(node):
    assert node.admin.stat().st_mode & 0o777 == 0o600
    with Conversation(node.admin) as talk:
        assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}
        assert talk.ask(REFRESH).status == 200
        assert talk.ask(http("GET", "/skerry/v1/denials")).status == 200
        assert talk.ask(http("GET", "/metrics")).status == 200


@only_root
def test_nobody_else_may_open_the_admin_socket(node):
    with pytest.raises(PermissionError), somebody(node, NOBODY, node.admin):
        pass


def test_the_admin_socket_answers_while_the_other_is_full(node):
    with (
        configured(node, CONFIG.replace("ipc:", "ipc:\n  max_connections: 4") + RULES),
        contextlib.ExitStack() as stack,
    ):
        full = None
        for _ in range(6):
            talk = stack.enter_context(Conversation(node.socket))
            with contextlib.suppress(ConnectionError):
                talk.send(GET_LIVE)
            answer = talk.response()
            if answer.status == 503:
                full = answer
                assert talk.rest() == b""
        assert full is not None
        assert full.headers["retry-after"] == "1"
        assert full.json["error"] == "connections: expected at most 4, got one more"
        with Conversation(node.admin) as admin:
            assert admin.ask(GET_LIVE).status == 200


# -- quotas


@only_root
def test_one_user_may_not_have_all_connections(node):
    limits = CONFIG.replace("ipc:", "ipc:\n  connections_per_uid: 3")
    with configured(node, limits + RULES), contextlib.ExitStack() as stack:
        for _ in range(3):
            talk = stack.enter_context(somebody(node, NOBODY))
            assert talk.ask(GET_LIVE).status == 200
        extra = stack.enter_context(somebody(node, NOBODY)).response()
        assert extra.json["error"] == f"connections of uid {NOBODY}: expected at most 3, got one more"
        assert extra.headers["retry-after"] == "1"
        assert stack.enter_context(somebody(node, OTHER)).ask(GET_LIVE).status == 200
        talk.sock.close()
        assert eventually(lambda: accepted(node, NOBODY))
    assert number(node, "skerry_over_quota", what="connections") >= 1


def accepted(node, uid):
    with somebody(node, uid) as talk, contextlib.suppress(OSError):
        talk.send(GET_LIVE)
        return talk.response().status == 200
    return False


@only_root
def test_requests_at_once_are_limited_per_user(node):
    body = Tensor("input", "UINT8", (1, 100), bytes(100))
    request = infer("same", [body])
    large = infer("same", [Tensor("input", "UINT8", (1, 100_000), bytes(100_000))], "Expect: 100-continue")
    head_end = large.index(b"\r\n\r\n") + 4
    limits = CONFIG.replace("ipc:", "ipc:\n  requests_per_uid: 1")
    with configured(node, limits + RULES), somebody(node, NOBODY) as one, somebody(node, NOBODY) as two:
        assert one.ask(large[:head_end]).status == 100
        answer = two.ask(request)
        assert refused(answer, 503) == f"requests of uid {NOBODY}: expected at most 1 at once, got one more"
        assert answer.headers["retry-after"] == "1"
        with Conversation(node.socket) as other:
            assert other.ask(request).status == 200
        assert one.ask(large[head_end:]).status == 200
        assert two.ask(request).status == 200, "nothing was lost, and its turn has come"


@only_root
def test_a_users_rate_is_limited_and_says_when_to_come_back(node):
    limits = CONFIG.replace("ipc:", "ipc:\n  rate_per_uid: 0.5")
    with configured(node, limits + RULES), somebody(node, NOBODY) as talk, somebody(node, NOBODY) as again:
        assert talk.ask(infer("plus", [floats(1)])).status == 200
        answer = again.ask(infer("plus", [floats(1)]))
        assert "expected at most 0.5 per second, got more" in refused(answer, 503)
        assert answer.headers["retry-after"] in {"1", "2"}
        assert again.ask(GET_LIVE).status == 200
        with somebody(node, OTHER) as other:
            assert other.ask(infer("plus", [floats(1)])).status == 200


def test_a_model_may_be_asked_as_often_as_its_manifest_says(node):
    with Conversation(node.socket) as talk:
        talk.send(infer("metered", [floats(1)]) * 6)
        statuses = [talk.response() for _ in range(6)]
        assert [answer.status for answer in statuses[:2]] == [200, 200]
        last = statuses[-1]
        assert last.status == 503
        assert "model metered: expected at most 2 requests per second" in last.json["error"]
        assert talk.ask(infer("plus", [floats(1)])).status == 200


# -- memory


@only_root
def test_slow_bodies_of_one_user_leave_memory_for_the_others(node):
    # Each declares a quarter of the model's memory and sends the beginning.
    head = http("POST", "/v2/models/same/infer", None, f"Content-Length: {60 << 20}")
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(somebody(node, NOBODY)) for _ in range(8)]
        for talk in talks:
            talk.send(head + bytes(100_000))
        for talk in talks[2:]:
            talk.send(bytes(10_000))
        assert eventually(lambda: number(node, "skerry_over_quota", what="memory") >= 6)
        with Conversation(node.socket) as other:
            data = bytes(BODY)
            request = infer(
                "same", [Tensor("input", "UINT8", (1, BODY), data)], parameters={"binary_data_output": True}
            )
            assert other.ask(request).body.endswith(data)


def test_whoever_does_not_fill_its_memory_loses_it_when_another_needs_it(node):
    with (
        configured(node, CONFIG.replace("ipc:", "ipc:\n  memory_per_uid: 0") + RULES),
        contextlib.ExitStack() as stack,
    ):
        head = http(
            "POST", "/v2/models/same/infer", None, f"Content-Length: {40 << 20}", "Expect: 100-continue"
        )
        assert eventually(lambda: number(node, "skerry_connections") == 1), "whoever asks for the number"
        slow = [stack.enter_context(Conversation(node.socket)) for _ in range(4)]
        for talk in slow:
            assert talk.ask(head).status == 100
            talk.send(bytes(40_000))
        body = Tensor("input", "UINT8", (1, BODY), bytes(BODY))
        request = infer("same", [body], parameters={"binary_data_output": True})
        quick = stack.enter_context(Conversation(node.socket))
        assert eventually(lambda: quick.ask(request).status == 503), "they hold all of it"
        assert eventually(lambda: quick.ask(request).status == 200), "until it is clear that they are slow"
        # The oldest has lost its memory; the others keep theirs for as long as nobody needs it.
        assert refused(slow[0].response(), 408) == (
            "request body: expected it whole in time, got silence; the connection is closed"
        )


def test_whoever_does_not_take_its_answer_loses_the_memory_it_lies_in(node):
    def ask(size):
        body = Tensor("input", "UINT8", (1, size), bytes(size))
        return infer("same", [body], parameters={"binary_data_output": True})

    with contextlib.ExitStack() as stack:
        quick = stack.enter_context(Conversation(node.socket))
        assert quick.ask(ask(BODY)).status == 200
        # From now on every request of this model gets room for such an answer, so sixteen have all there is.
        deaf = [stack.enter_context(Conversation(node.socket)) for _ in range(16)]
        for talk in deaf:
            talk.send(ask(600_000))
        assert eventually(lambda: quick.ask(ask(1000)).status == 503), "they hold all of it"
        assert eventually(lambda: quick.ask(ask(1000)).status == 200), "until it is clear that they are slow"
        with pytest.raises(EOFError):
            deaf[0].response()


@only_root
def test_bodies_in_chunks_are_counted_as_they_grow(node):
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    limits = CONFIG.replace("ipc:", "ipc:\n  memory_per_uid: 8MiB")
    start = http("POST", "/v2/models/same/infer", None, "Transfer-Encoding: chunked")
    with configured(node, limits + RULES), somebody(node, NOBODY) as one, somebody(node, NOBODY) as two:
        one.send(start + chunk * 3)
        two.send(start)
        with contextlib.suppress(ConnectionError):
            for _ in range(8):
                two.send(chunk)
        answer = two.response()
        assert f"large requests of uid {NOBODY}: expected at most 8388608 bytes" in refused(answer, 503)
        assert (answer.headers["retry-after"], two.rest()) == ("1", b"")
        one.send(b"0\r\n\r\n")
        assert one.response().status == 400, "whole, and no request"
        with somebody(node, NOBODY) as three:
            three.send(start + chunk * 7 + b"0\r\n\r\n")
            assert three.response().status == 400, "nothing is counted of those who are gone"


def test_the_page_of_denials_is_json(node):
    with Conversation(node.admin) as talk:
        assert isinstance(json.loads(talk.ask(http("GET", "/skerry/v1/denials")).body)["denials"], list)
