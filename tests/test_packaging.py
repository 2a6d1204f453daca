"""What is written in several places agrees: versions in constraints, conda environment and package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml


def pins(repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_dependencies(repository, *extras):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [normal(re.match(r"[\w.-]+", text)[0]) for wanted in lists for text in wanted]


def test_every_direct_dependency_is_pinned(repository):
    assert set(direct_dependencies(repository, "test")) - set(pins(repository)) == set()


def test_the_conda_environment_has_the_pinned_versions(repository):
    environment = yaml.safe_load((repository / "envs/lungddpm.yaml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    listed = {normal(name): version for name, _, version in (entry.partition("==") for entry in pip)}
    assert listed == {name: pins(repository)[name] for name in listed}
    assert set(listed) == set(direct_dependencies(repository))


def test_a_folder_of_the_packages_name_does_not_hide_an_editable_install(repository, tmp_path):
    pytest.importorskip("setuptools")
    source, installed, working = (tmp_path / name for name in ("source", "installed", "working"))
    shutil.copytree(repository / "lungddpm", source / "lungddpm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(repository / name, source / name)
    build = f"import setuptools.build_meta as backend; backend.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    # A clone is a folder called lungddpm, with the package in another one of that name.
    shutil.copytree(source, working / "lungddpm")
    find = f"import site; site.addsitedir({str(installed)!r}); import lungddpm.config as c; print(c.__file__)"
    # As `python -m snakemake` does, and a PYTHONPATH that leads to where clones lie.
    for python in ([sys.executable, "-S", "-c"], [sys.executable, "-S", "-P", "-c"]):
        libraries = [path for path in sys.path if path.endswith("site-packages")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(working), *libraries])}
        found = subprocess.run(
            [*python, find], cwd=working, env=environment, check=True, capture_output=True, text=True
        )
        assert Path(found.stdout.strip()) == source / "lungddpm/config/__init__.py"


def test_every_rule_has_an_environment_that_exists(repository):
    for rules in (repository / "workflow/rules").glob("*.smk"):
        text = rules.read_text()
        environments = re.findall(r"^    conda:\n +\"(.*)\"$", text, re.MULTILINE)
        assert len(environments) == len(re.findall(r"^(?:rule|checkpoint) \w+:$", text, re.MULTILINE)), rules.name
        assert all((rules.parent / path).is_file() for path in environments)


def test_container_and_conda_environment_have_one_python(repository):
    (of_conda,) = re.findall(r"^  - python=([\d.]+)$", (repository / "envs/lungddpm.yaml").read_text(), re.MULTILINE)
    (of_container,) = re.findall(
        r"^FROM .*python:([\d.]+)", (repository / "envs/Containerfile").read_text(), re.MULTILINE
    )
    assert of_conda == of_container


# What metadata call the licences, by their names in SPDX.
SPDX = {
    "Apache Software License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "BSD": "BSD-3-Clause",
    "Python Software Foundation License": "PSF-based",
}


def licence_of(name):
    """As a package states it: an expression, a classifier, or the first line of a text."""
    stated = metadata.metadata(name)
    classifiers = [text for text in stated.get_all("Classifier", []) if text.startswith("License ::")]
    text = stated["License-Expression"] or (classifiers and classifiers[0].rpartition(":: ")[2])
    text = text or (stated["License"] or "").partition("\n")[0]
    return SPDX.get(text, text)


def test_the_page_of_dependencies_has_their_versions_and_licences(repository):
    page = (repository / "docs/reference/dependencies.md").read_text()
    table = page.partition("|---")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+?) \|", table, re.MULTILINE)
    listed = {normal(name): (version, licence) for name, version, licence in rows}
    extras = ("test", "lungmask", "totalsegmentator")
    assert list(listed) == direct_dependencies(repository, *extras)
    assert {name: version for name, (version, _) in listed.items()} == {name: pins(repository)[name] for name in listed}
    optional = set(direct_dependencies(repository, *extras)) - set(direct_dependencies(repository, "test"))
    for name in set(listed) - optional:
        assert listed[name][1] == licence_of(name), name
