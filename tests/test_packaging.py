"""What is written in several places agrees: versions in constraints, conda environment and package."""

import re
import tomllib

import yaml


def pins(repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_dependencies(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    return [normal(re.match(r"[\w.-]+", text)[0]) for text in wanted]


def test_every_direct_dependency_is_pinned(repository):
    assert set(direct_dependencies(repository)) - set(pins(repository)) == set()


def test_the_conda_environment_has_the_pinned_versions(repository):
    environment = yaml.safe_load((repository / "envs/lungddpm.yaml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    listed = {normal(name): version for name, _, version in (entry.partition("==") for entry in pip)}
    assert listed == {name: pins(repository)[name] for name in listed}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert set(listed) == {normal(re.match(r"[\w.-]+", text)[0]) for text in project["dependencies"]}
