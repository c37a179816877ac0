"""ONNX's tests of its operators through the daemon: bit for bit what ONNX Runtime answers by itself.

Some 1,400 models, of which the ordinary suite takes a sample. Where the daemon does not answer alike, a table below
says why.
"""

import sys

import onnxnodes
import pytest
from node import temporary_node

#: Models loaded at once: each has a process of its own.
GROUP = 64
#: Every 23rd: about sixty that run, and some of each foreign kind that there is much of.
SAMPLE = 23
ALL = 1

#: Kind of type -> what the daemon says of a model that has it; the protocol has no word for any.
FOREIGN = {
    "seq": "got seq(",
    "optional": "got optional(",
    "tensor(float8": "got tensor(float8",
    "tensor(float4": "got tensor(float4",
    "tensor(int": "got tensor(int",  # 2 and 4 bits
    "tensor(uint": "got tensor(uint",  # likewise
}
#: Models without inputs, which a request of the protocol cannot ask: it has one at least.
NO_INPUTS = {"test_constant"}
#: Dropout in training draws numbers: only the form of its answer can be compared.
RANDOM = {
    "test_training_dropout",
    "test_training_dropout_default",
    "test_training_dropout_default_mask",
    "test_training_dropout_mask",
}


def judge(folder, every, tell=lambda _: None):
    """Run all groups; returns how many answered, and how many were refused for their types. `tell` hears how far."""
    cases = onnxnodes.cases(folder, every)
    answered = refused = 0
    with temporary_node() as node:
        node.start()
        for at in range(0, len(cases), GROUP):
            group = {f"n{at + index:04}": case for index, case in enumerate(cases[at : at + GROUP])}
            onnxnodes.serve(node, group)
            table = {name: row for (name, _), row in node.table().items()}
            for name, case in group.items():
                if case.foreign:
                    assert refused_for_its_types(table[name], case), (case.name, table[name])
                    refused += 1
                    continue
                status, found = onnxnodes.ask(node, name, case.inputs)
                if case.name in NO_INPUTS:
                    assert (status, "expected 1 to 256 inputs" in found) == (400, True), case.name
                    continue
                assert status == 200, (case.name, found, table[name]["reason"])
                assert same(case, found), case.name
                answered += 1
            tell(f"{at + len(group)} of {len(cases)} models, {answered} answered alike")
        assert "Traceback" not in node.log.read_text()
        assert node.stop() == 0
    return answered, refused


def refused_for_its_types(row, case):
    said = [text for kind, text in FOREIGN.items() if any(name.startswith(kind) for name in case.foreign)]
    return row["state"] == "UNAVAILABLE" and any(text in row["reason"] for text in said)


def same(case, found):
    if case.name not in RANDOM:
        return found == case.outputs
    return [(tensor.name, tensor.datatype, tensor.shape) for tensor in found] == [
        (tensor.name, tensor.datatype, tensor.shape) for tensor in case.outputs
    ]


def test_a_sample_of_onnx_operators_answers_as_onnxruntime_does(tmp_path):
    answered, refused = judge(tmp_path, SAMPLE)
    assert answered >= 50
    assert refused


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_onnx_operator_answers_as_onnxruntime_does(tmp_path, capsys):
    def tell(text):
        with capsys.disabled():
            sys.stderr.write(f"\r{text} ")

    answered, refused = judge(tmp_path, ALL, tell)
    assert answered >= 1300
    assert refused >= 90
