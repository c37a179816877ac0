"""The client-only wheel: what is in it, and that it infers with nothing but numpy beside it."""

import email
import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zoo
from node import temporary_node

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds wheels, is not installed"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("dist")
    subprocess.run(
        ["/bin/sh", ROOT / "packaging/build-client.sh", target],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
        capture_output=True,
        timeout=100,
    )
    (built,) = target.iterdir()
    return built


def test_the_wheel_has_the_very_files_of_the_package_and_needs_only_numpy(wheel):
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.startswith("skerry/")]
        for name in modules:
            assert archive.read(name) == (ROOT / name).read_bytes()
        (described,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(described))
    assert metadata["Name"] == "skerry-client"
    assert [need.replace(" ", "") for need in metadata.get_all("Requires-Dist")] == ["numpy<3,>=2.0"]
    assert "skerry/py.typed" in modules
    assert "skerry/oip.py" not in modules  # msgspec's


def test_a_fresh_environment_with_numpy_alone_infers(wheel, tmp_path):
    venv.create(tmp_path, symlinks=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    numpy = Path(np.__file__).parent
    for part in (numpy, numpy.with_name("numpy.libs")):
        if part.exists():
            (site / part.name).symlink_to(part)
    every_module = sorted(path.stem for path in (site / "skerry").glob("*.py"))
    code = (
        "import sys, importlib, numpy as np\n"
        f"for name in {every_module}: importlib.import_module('skerry.' + name) if name[0] != '_' else None\n"
        "import skerry\n"
        "assert sys.prefix in skerry.__file__\n"
        "with skerry.Client(sys.argv[1], shared_memory=True) as client:\n"
        "    for value in (1, 2):\n"
        "        x = np.full((100, 1000), value, np.float32)\n"
        "        assert (client.infer('plus', {'input': x}).outputs['output'] == value + 1).all()\n"
    )
    with temporary_node() as node:
        node.add(zoo.add(1), "plus")
        node.start()
        done = subprocess.run(
            [tmp_path / "bin/python", "-I", "-W", "error", "-c", code, node.socket],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
