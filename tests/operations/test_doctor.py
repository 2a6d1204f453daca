"""`lungddpm doctor` against what the package declares to need."""

import importlib.metadata
import tomllib

from packaging.requirements import Requirement

from lungddpm.operations.doctor import problems


def test_every_missing_dependency_is_reported_and_no_extra(repository, monkeypatch):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    needed = {Requirement(text).name.lower() for text in project["dependencies"]}
    assert {problem.split(" (pip install")[0].lower() for problem in problems()} == needed


def test_nothing_is_missing_where_the_tests_run():
    assert problems() == []
