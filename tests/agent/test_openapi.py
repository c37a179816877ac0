"""docs/openapi.yaml: in step with the table of pages, and true, judged by schemathesis against a real daemon.

An operation marked `x-skerry-served: false` is described ahead of its time: it has to be no page yet.
"""

import copy
from pathlib import Path

import psutil
import pytest
import yaml
import zoo
from hypothesis import HealthCheck, Phase, given, settings
from node import temporary_node

from agent.ipc.head import HeadParser

DOCUMENT = yaml.safe_load((Path(__file__).parents[2] / "docs" / "openapi.yaml").read_text())
VERBS = ("get", "post", "put", "delete", "patch", "options")
MAX_BODY_BYTES = 1 << 20
#: Requests per operation; infer, the one with a body worth varying, gets more.
EXAMPLES = 6
INFER_EXAMPLES = 80


def operations(*, served):
    """(verb, path) of each described operation, those marked as not served apart."""
    return [
        (verb, path)
        for path, item in DOCUMENT["paths"].items()
        for verb, operation in item.items()
        if verb in VERBS and operation.get("x-skerry-served", True) == served
    ]


SERVED = operations(served=True)


def ask(verb, path):
    """What the daemon makes of the head of such a request."""
    names = {"model": "m", "version": "7", "region": "r", "repository": "x"}
    head = f"{verb.upper()} {path.format(**names)} HTTP/1.1\r\nHost: x\r\n\r\n"
    return HeadParser().parse(head.encode(), MAX_BODY_BYTES)


# --- in step with the table of pages ----------------------------------------------------------------------


def test_every_page_is_described():
    reached = {ask(verb, path).page for verb, path in SERVED}
    assert reached - {None} == set(type(ask("get", "/v2").page))


@pytest.mark.parametrize(("verb", "path"), SERVED)
def test_what_is_described_is_a_page_and_other_verbs_are_not(verb, path):
    responses = DOCUMENT["paths"][path][verb]["responses"]
    if "{repository}" not in path:  # a page that is known, and refused
        assert ask(verb, path).error is None
    else:
        assert "501" in responses
    for other in set(VERBS) - set(DOCUMENT["paths"][path]):
        assert ask(other, path).error is not None


@pytest.mark.parametrize(("verb", "path"), operations(served=False))
def test_what_is_marked_as_not_served_is_no_page(verb, path):
    found = ask(verb, path)
    # /v2/models/stats is the page of a model named so, until it is one of its own.
    assert found.error is not None or path == "/v2/models/stats", "served now: take the mark away"


def test_the_document_is_openapi():
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schemathesis.openapi.from_dict(DOCUMENT).validate()


# --- true -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    """A daemon with two models, one of them in two versions, and one that cannot be loaded; on TCP."""
    with temporary_node() as node:
        node.configure("ipc:\n  tcp: 127.0.0.1:0\n")
        node.add(zoo.add(1), "alpha", 1)
        node.add(zoo.add(2), "alpha", 2)
        node.add(zoo.two_outputs(), "beta")
        node.add(zoo.sequence_output(), "broken")
        node.start()
        (port,) = {
            connection.laddr.port
            for connection in psutil.Process(node.child.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in node.log.read_text()
        assert node.stop() == 0


def described():
    """The document with names that exist beside one that does not, and requests that can be answered."""
    document = copy.deepcopy(DOCUMENT)
    document["paths"] = {
        path: {name: part for name, part in item.items() if name not in VERBS or (name, path) in SERVED}
        for path, item in document["paths"].items()
        if any((verb, path) in SERVED for verb in VERBS)
    }
    schemas = document["components"]["schemas"]
    parameters = document["components"]["parameters"]
    parameters["model"]["schema"] = {"enum": ["alpha", "alpha", "beta", "broken", "nobody"]}
    parameters["version"]["schema"] = {"enum": [1, 2, 9]}
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 2], "data": [1, 2.5]}
    binary = {"name": "output", "parameters": {"binary_data": True}}
    good = [
        {"inputs": [tensor]},
        {"inputs": [tensor], "id": "7", "outputs": [binary]},
        {"inputs": [tensor | {"data": [[1, 2]]}], "parameters": {"timeout": 1_000_000}},
        {"inputs": [tensor], "parameters": {"sequence_id": 1}},
        {"inputs": [tensor | {"shape": [2, 2]}]},
    ]
    schemas["InferRequest"] = {"anyOf": [{"enum": good}, schemas["InferRequest"]]}
    return document


@pytest.fixture(scope="module")
def judge(address):
    """judge(verb, path, examples, generation mode): ask the daemon, compare what it answers with the document."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.specs.openapi import checks

    requests = pytest.importorskip("requests", reason="schemathesis brings it")
    schema = schemathesis.openapi.from_dict(described())
    seen = {}

    def run(verb, path, examples, mode):
        operation = schema[path][verb.upper()]

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def conforms(case):
            response = case.call(base_url=address, session=session)
            assert response.status_code != 500, response.text
            case.validate_response(
                response,
                checks=[
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_headers_conformance,
                    checks.response_schema_conformance,
                ],
            )
            seen.setdefault((verb, path), set()).add(response.status_code)

        conforms()
        return seen[verb, path]

    with requests.Session() as session:
        yield run


@pytest.mark.parametrize(("verb", "path"), [each for each in SERVED if not each[1].endswith("/infer")])
def test_answers_are_as_described(judge, verb, path):
    assert judge(verb, path, EXAMPLES, "positive")


@pytest.mark.parametrize("path", [path for _, path in SERVED if path.endswith("/infer")])
def test_inference_answers_as_described_whatever_is_sent(judge, path):
    judge("post", path, INFER_EXAMPLES, "positive")
    seen = judge("post", path, INFER_EXAMPLES // 2, "negative")
    assert {200, 400, 404, 503} <= seen
