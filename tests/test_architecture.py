"""Values flow one way: a room imports rooms before it only, and no files import one another."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lungddpm

ROOMS = [
    "core", "config", "sources", "layouts", "models", "generators", "synthesis", "arms", "segmentation", "evaluation",
    "quality", "verdict", "report", "operations", "api", "", "cli", "__main__",
]  # fmt: skip
"""In the order of the data; "" is the package's own file, which offers `api`."""


def imports(folder: Path) -> dict[str, set[str]]:
    """What the modules of a package import of it, at the top, in functions and for types: all by dotted name.

    A package's own file has the name of the package. Its version is anybody's, and that importing a module first runs
    the packages around it is left out.
    """
    files = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: import by the full name"
                within = {f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"}
                names |= {name if name in files else node.module for name in within}
        found[module] = (names & set(files)) - {module}
    return found


@pytest.fixture(scope="module")
def package():
    return imports(Path(lungddpm.__file__).parent)


def room(module: str) -> int:
    """The place of a module's room."""
    return ROOMS.index(module.partition(".")[2].partition(".")[0])


def test_no_room_imports_a_later_one(package):
    assert [
        f"{module} imports {other}"
        for module, others in sorted(package.items())
        for other in sorted(others)
        if room(other) > room(module)
    ] == []


def test_no_files_import_one_another(package):
    assert TopologicalSorter(package).prepare() is None


def test_an_arrow_back_and_a_circle_are_seen(tmp_path):
    texts = {
        "core/one.py": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from made_up.core import two\n",
        "core/two.py": "def late():\n    from made_up.core.one import thing\n    import made_up.cli\n",
        "cli.py": "import json\n",
        "__init__.py": "",
        "core/__init__.py": "",
    }
    for name, text in texts.items():
        path = tmp_path / "made_up" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = imports(tmp_path / "made_up")
    assert found["made_up.core.two"] == {"made_up.core.one", "made_up.cli"}
    assert room("made_up.cli") > room("made_up.core.two")
    with pytest.raises(CycleError):
        TopologicalSorter(found).prepare()
