from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from providers import cores
from skerry.errors import ConfigError


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site-packages that hides the real one."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(
        sys.modules, "onnxruntime", raising=False
    )  # other tests import it; its finder remembers
    importlib.invalidate_caches()
    yield tmp_path
    importlib.invalidate_caches()


def install(site, name, version="1.2.3", files=("onnxruntime/__init__.py",), *, record=True):
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if record:
        (info / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))
    for file in files:
        path = site / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise AssertionError('imported')\n")
    importlib.invalidate_caches()


def test_the_one_core_is_found_without_importing_it(site):
    install(site, "onnxruntime", "1.31.1")
    install(site, "onnxruntime-ep-openvino", "1.8.1", ("onnxruntime_ep_openvino/__init__.py",))
    assert cores.check_core() == ("onnxruntime", "1.31.1")


def test_another_core_counts_as_well(site):
    install(site, "onnxruntime-openvino", "1.24.1")
    assert cores.check_core() == ("onnxruntime-openvino", "1.24.1")


def test_no_core_is_refused_with_the_command_that_installs_one(site):
    install(site, "numpy", "2.0.0", ("numpy/__init__.py",))
    with pytest.raises(ConfigError, match="expected one distribution of it, got none") as caught:
        cores.check_core()
    assert caught.value.hint == "pip install 'skerry[cpu]'"


def test_two_cores_are_refused_with_the_command_that_repairs_it(site):
    install(site, "onnxruntime", "1.31.1")
    install(site, "onnxruntime-gpu", "1.31.1")
    with pytest.raises(ConfigError, match="got 2: onnxruntime, onnxruntime-gpu") as caught:
        cores.check_core()
    assert caught.value.hint == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --force-reinstall 'skerry[cpu]'"
    )


def test_the_repair_keeps_the_accelerated_core(site):
    install(site, "onnxruntime")
    install(site, "onnxruntime-openvino")
    with pytest.raises(ConfigError) as caught:
        cores.check_core()
    assert caught.value.hint.endswith("'skerry[openvino]'")


def test_a_core_whose_files_went_with_another_one_is_refused(site):
    install(site, "onnxruntime")
    (site / "onnxruntime" / "__init__.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"expected the files of onnxruntime 1\.2\.3, got none of them"):
        cores.check_core()


def test_a_plugin_with_a_former_cores_name_is_no_core(site):
    install(site, "onnxruntime", "1.31.1")
    install(site, "onnxruntime-qnn", "2.7.0", ("onnxruntime_qnn/__init__.py",))
    assert cores.check_core().distribution == "onnxruntime"


def test_a_distribution_without_a_record_counts_by_its_name(site):
    install(site, "onnxruntime", record=False)
    assert cores.check_core().distribution == "onnxruntime"


def test_this_environment_is_sound_and_stays_without_onnxruntime():
    code = "import sys; from providers import cores; cores.check_core(); print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
