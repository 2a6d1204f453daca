"""What CONTRIBUTING.md shows works: its diffs apply to the code as it is, keep its style, and pass their tests."""

import os
import re
import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def changed(repository, tmp_path):
    """A copy of package and tests with every diff of the page, and the files that the diffs touch."""
    for name in ("lungddpm", "tests"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(repository / "pyproject.toml", tmp_path / "pyproject.toml")
    page = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    diffs = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(diffs) == 3
    for diff in diffs:
        subprocess.run(["git", "apply", "-C1", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    return tmp_path, re.findall(r"^\+\+\+ b/(.*)$", "".join(diffs), re.MULTILINE)


def test_the_diffs_apply_keep_the_style_and_pass_their_tests(changed):
    folder, files = changed
    for tool in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *tool, *files], cwd=folder, check=True)
    tests = [name for name in files if name.startswith("tests/")]
    assert len(tests) == 3
    names = "noise or npz or file_is_listed or mean_surface_distance"
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-v", "-k", names, *tests]
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, text=True, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert "3 passed" in run.stdout
