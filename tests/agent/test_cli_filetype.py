"""The demo's features and labels against Magika itself, and where its model comes from."""

import os
import random
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before magika brings onnxruntime

from agent.cli import demo, filetype
from skerry.errors import Unavailable, Untrusted

ROOT = Path(__file__).parents[2]
PACKAGE = filetype.importlib.util.find_spec("magika")


@pytest.fixture(scope="module")
def judge():
    """Magika as its authors publish it."""
    return pytest.importorskip("magika").Magika()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return filetype.load(tmp_path_factory.mktemp("cache"), lambda _: None)


def label(ours, judge, path):
    tokens = ours.tokens(path)
    if tokens is None:
        return None
    return ours.label(judge._onnx_session.run(["target_label"], {"bytes": tokens})[0])


def edge_cases(folder):
    noise = random.Random(7)
    contents = {
        "white-space": b" \n\t" * 2000,
        "eight": b"12345678",
        "seven": b"1234567",
        "eight-after-strip": b"   12345678   ",
        "begins-blank": b"\n" * 500 + b"import os\n" * 50,
        "ends-blank": b"import os\n" * 50 + b"\n" * 500,
        "one-block": b"<html>" + b"a" * 4090,
        "blank-block": b" " * 4096 + b"<html>" * 100,
        "two-blocks": b"{" + b'"a": 1,' * 2000 + b'"b": 2}',
        "1024": b"x = 1\n" * 170 + b"y=2\n",
        "random": noise.randbytes(10_000),
        "unsure": b"hello there, this is 7 words long",
        "nul": bytes(5000),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in contents]


def test_labels_and_scores_are_magikas_own(ours, judge, tmp_path):
    files = [*demo._samples(tmp_path), *sorted((ROOT / "agent").glob("*.py")), *edge_cases(tmp_path)]
    assert len(files) > 25
    compared = 0
    for path in files:
        expected = judge.identify_path(path)
        found = label(ours, judge, path)
        if found is None:
            assert str(expected.dl.label) == "undefined", path
            continue
        compared += 1
        assert found == (str(expected.output.label), pytest.approx(expected.score)), path
    assert compared > 20


def test_tokens_are_what_the_model_takes(ours, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"\n\n" + bytes(range(65, 91)) + b" ")
    tokens = ours.tokens(path)
    assert (tokens.shape, tokens.dtype) == ((1, 2048), np.int32)
    assert tokens[0, :27].tolist() == [*range(65, 91), 32]
    assert tokens[0, 27:1024].tolist() == [256] * 997
    assert tokens[0, -28:].tolist() == [10, 10, *range(65, 91)]


def test_a_low_score_is_only_text_or_unknown(ours):
    labels = ours.config["target_labels_space"]
    for guess, expected in (("python", "txt"), ("elf", "unknown")):
        scores = np.zeros((1, len(labels)), np.float32)
        scores[0, labels.index(guess)] = 0.3
        assert ours.label(scores)[0] == expected
        scores[0, labels.index(guess)] = 0.99
        assert ours.label(scores)[0] == guess


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(filetype.importlib.util, "find_spec", lambda _: None)


def wheel(cache, change=None):
    """A wheel in `cache` with the files of the installed package; `change` is damaged."""
    cache.mkdir(exist_ok=True)
    site = Path(PACKAGE.origin).parents[1]
    with zipfile.ZipFile(cache / f"magika-{filetype.RELEASE}-py3-none-any.whl", "w") as archive:
        for name in filetype.DIGESTS:
            data = (site / name).read_bytes()
            archive.writestr(name, data[:-1] + b"?" if name == change else data)


def test_a_downloaded_wheel_is_used_without_asking_again(not_installed, tmp_path, ours):
    wheel(tmp_path)
    said = []
    found = filetype.load(tmp_path, said.append)
    assert found == ours
    assert said == []


@pytest.mark.parametrize("name", list(filetype.DIGESTS))
def test_a_damaged_file_is_refused_with_both_digests(not_installed, tmp_path, name):
    wheel(tmp_path, change=name)
    with pytest.raises(Untrusted) as caught:
        filetype.load(tmp_path, lambda _: None)
    assert name in str(caught.value)
    assert str(caught.value).count("sha256:") == 2


def test_without_a_link_the_message_says_what_to_install(not_installed, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(filetype.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Unavailable, match="No matching distribution") as caught:
        filetype.load(tmp_path / "cache", lambda _: None)
    assert "pip install magika==" in caught.value.hint
