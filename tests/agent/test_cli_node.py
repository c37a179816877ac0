"""The command line and the client against a real daemon, and the demo as a stranger runs it."""

import contextlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zoo
from node import temporary_node
from typer.testing import CliRunner
from wire_http import Conversation, http

from agent.cli import exits
from agent.cli.app import app


@pytest.fixture
def node():
    with temporary_node() as node:
        yield node.start()


@pytest.fixture
def skerry(node):
    def run(*arguments):
        return CliRunner().invoke(app, ["--home", str(node.home), *map(str, arguments)], prog_name="skerry")

    return run


@pytest.fixture
def model(tmp_path):
    def write(data):
        path = tmp_path / "model.onnx"
        path.write_bytes(data)
        return path

    return write


def test_a_model_is_added_asked_listed_explained_and_removed(skerry, model):
    for data, name in ((zoo.add(1), "alpha"), (zoo.scale(3), "beta")):
        result = skerry("model", "add", model(data), "--name", name)
        assert result.exit_code == exits.OK, result.stderr
        assert f"serving    {name}/1 on " in result.stderr
    for name, expected in (("alpha", [[3.0, 5.0]]), ("beta", [[6.0, 12.0]])):
        answer = json.loads(skerry("infer", name, "--input", "input=[[2, 4]]", "--json").stdout)
        assert [output["data"] for output in answer["outputs"].values()] == [expected]
        assert answer["version"] == "1"
    rows = {row["name"]: row for row in json.loads(skerry("ps", "--json").stdout)["models"]}
    assert [rows[name]["state"] for name in ("alpha", "beta")] == ["READY", "READY"]
    assert [rows[name]["requests"] for name in ("alpha", "beta")] == [1, 1]
    why = json.loads(skerry("why", "beta", "--json").stdout)
    assert (why["model"], why["steps"][why["accepted"]]["verdict"]) == ("beta", "accepted")
    for command in ("status", "ps", "providers"):
        assert skerry(command).exit_code == exits.OK
    assert skerry("model", "remove", "alpha").exit_code == exits.OK
    assert skerry("infer", "alpha", "--input", "input=[[2, 4]]").exit_code == exits.NOT_FOUND
    assert skerry("infer", "beta", "--input", "input=[[2, 4]]").exit_code == exits.OK


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_pasted_example_works(skerry, model):
    added = skerry("model", "add", model(zoo.scale(3)), "--name", "beta")
    example = next(line for line in added.stderr.splitlines() if line.startswith("try it")).partition("curl")[
        2
    ]
    done = subprocess.run(f"curl -s {example}", shell=True, capture_output=True, check=True)  # noqa: S602 - as a user pastes it
    assert json.loads(done.stdout)["model_name"] == "beta"


def test_a_second_version_is_served_when_add_returns(skerry, model):
    skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    skerry("model", "add", model(zoo.add(10)), "--name", "alpha")
    answer = json.loads(skerry("infer", "alpha", "-i", "input=[[1]]", "--json").stdout)
    assert (answer["version"], answer["outputs"]["output"]["data"]) == ("2", [[11.0]])


def test_why_still_answers_after_the_daemon_is_gone(skerry, model, node):
    skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    before = json.loads(skerry("why", "alpha", "--json").stdout)
    assert node.stop() == 0
    result = skerry("why", "alpha", "--json")
    assert json.loads(result.stdout) == before
    assert skerry("ps").exit_code == exits.NO_DAEMON


def test_errors_of_the_daemon_become_exit_codes(skerry, model):
    skerry("model", "add", model(zoo.add(1)), "--name", "alpha")
    assert skerry("infer", "gamma", "-i", "x=[1]").exit_code == exits.NOT_FOUND
    assert skerry("infer", "alpha", "-i", "input=[1]").exit_code == exits.USAGE  # one dimension too few
    assert skerry("why", "gamma").exit_code == exits.NOT_FOUND
    assert skerry("model", "clear", "gamma").exit_code == exits.NOT_FOUND


DATATYPES = ["BOOL", "INT8", "UINT64", "FP16", "BF16", "FP64", "BYTES"]


@pytest.fixture(scope="module")
def mirror():
    """A daemon with a model per datatype that gives back what it gets."""
    with temporary_node() as node:
        for datatype in DATATYPES:
            node.add(zoo.identity(datatype), f"same-{datatype}")
        yield node.start()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_the_client_carries_every_kind_of_datatype(mirror, datatype):
    if datatype == "BYTES":
        sent = np.array([[b"a", b""], [b"\xc3\xbc", b"bc"]], object)
    else:
        dtypes = {"BF16": "uint16", "BOOL": "bool", "FP16": "float16", "FP64": "float64"}
        sent = np.array([[0, 1], [1, 0]]).astype(dtypes.get(datatype, datatype.lower()))
    with mirror.client() as client:
        result = client.infer(
            f"same-{datatype}", {"input": sent}, datatypes={"input": datatype}, request_id="r", timeout_s=20
        )
    assert result.outputs["output"].tolist() == sent.tolist()
    assert (result.datatypes, result.request_id) == ({"output": datatype}, "r")


def test_a_remembered_answer_is_marked_and_another_input_is_not(mirror):
    cache = {"policy": "exact", "scope": "uid", "ttl": "1h"}
    mirror.add(zoo.add(1), "kept", cache=cache)
    mirror.refresh()
    with mirror.client() as client:
        answers = [client.infer("kept", {"input": np.full((1, 1), x, np.float32)}) for x in (1, 1, 2, 2)]
    assert [answer.cached for answer in answers] == [False, True, False, True]
    assert [answer.outputs["output"].item() for answer in answers] == [2.0, 2.0, 3.0, 3.0]


@pytest.mark.timeout(180)
def test_the_demo_shows_what_it_claims(tmp_path):
    command = [sys.executable, "-P", "-m", "agent.cli", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == exits.OK, done.stdout + done.stderr
    assert any(line.split()[:2] == ["skerry/client.py", "python"] for line in done.stdout.splitlines())
    assert "the daemon ended with exit code 0" in done.stdout
    assert "a daemon there says: UNAVAILABLE" in done.stdout
    assert "Traceback" not in done.stderr


def ask_if_open(talk, request):
    with contextlib.suppress(BrokenPipeError):
        talk.send(request)
    return talk.response().status


def test_the_command_line_gets_through_while_others_have_all_connections():
    with temporary_node() as node, contextlib.ExitStack() as stack:
        node.configure("ipc:\n  max_connections: 2\naccess:\n  rules: ['deny * model:secret']\n")
        node.add(zoo.add(1), "secret")
        node.start()
        assert node.request("GET", "/v2/models/secret")[0] == 403
        live = http("GET", "/v2/health/live")
        # Whoever is turned away may find the connection closed already when it asks.
        answers = [ask_if_open(stack.enter_context(Conversation(node.socket)), live) for _ in range(4)]
        assert answers.count(503) >= 2
        for command in ("status", "ps", "denials", "providers"):
            result = CliRunner().invoke(app, ["--home", str(node.home), command])
            assert result.exit_code == exits.OK, result.stderr
            if command == "denials":
                assert "deny * model:secret" in result.stdout
        listed = CliRunner().invoke(app, ["--home", str(node.home), "denials", "--json"])
        assert [item["action"] for item in json.loads(listed.stdout)["denials"]] == ["read"]
