"""The documents name what there is: once, and nothing else."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("skerry", "agent", "providers", "store", "sync")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])


def _map_of(package):
    """What the code map says of one package: the names in backticks, `rpc/front` for agent.rpc.front."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    code_map = text.split("## Code map", 1)[1].split("\n## ", 1)[0]
    section = code_map.split(f"**`{package}`**", 1)[1].split("\n**`", 1)[0].split("\n\n`", 1)[0]
    return Counter(name for name in re.findall(r"`([^`]+)`", section) if " " not in name and name != "-m")


def _modules(package):
    folder = ROOT / package
    return {
        str(path.relative_to(folder).with_suffix(""))
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_the_code_map_names_every_module_once_and_no_other(package):
    assert _map_of(package) == Counter(_modules(package))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_between_documents_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_document_says_a_line_twice(document):
    lines = (
        line.strip() for line in re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL).splitlines()
    )
    twice = [line for line, times in Counter(lines).items() if times > 1 and len(line) > 40]
    assert not [line for line in twice if not line.startswith("|")]


def test_the_table_of_dependencies_gives_a_reason_for_each_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    project = text.split("\ndependencies = [", 1)[1].split("dev = [", 1)[0]
    names = set(re.findall(r'^\s+"([a-z0-9-]+)|= \["([a-z0-9-]+)', project, flags=re.MULTILINE))
    table = (ROOT / "ARCHITECTURE.md").read_text().split("## Dependencies, and why", 1)[1]
    words = {name for pair in names for name in pair if name and not name.startswith("onnxruntime-")}
    assert sorted(name for name in words if name not in table) == []


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[0].split()) - {"help"}
    assert set(re.findall(r"^## make (\S+) ", text, flags=re.MULTILINE)) == phony
