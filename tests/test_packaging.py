"""What is written in several places agrees: versions in constraints, conda environment and package."""

import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from contextlib import suppress
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


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
    assert set(direct_dependencies(repository, "docs", "test")) - set(pins(repository)) == set()


def test_pins_agree_with_what_the_pinned_packages_need(repository):
    """Of the installed ones. Those of an extra are compared where it is installed: offline, no other has metadata."""
    pinned, refused, compared = pins(repository), set(), 0
    for name, version in pinned.items():
        with suppress(metadata.PackageNotFoundError):
            found = metadata.distribution(name)
            for text in (found.requires or []) if found.version == version else []:
                needed = Requirement(text)
                there = pinned.get(normal(needed.name))
                # What an extra of the package needs is not installed by its name alone.
                if there and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                    compared += 1
                    if not needed.specifier.contains(there, prereleases=True):
                        refused.add(f"{name} needs {needed}, but {there} is pinned")
    assert compared > 200
    assert refused == set()


def test_the_conda_environment_has_the_pinned_versions(repository):
    environment = yaml.safe_load((repository / "envs/lungddpm.yaml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    listed = {normal(name): version for name, _, version in (entry.partition("==") for entry in pip)}
    assert listed == {name: pins(repository)[name] for name in listed}
    assert set(listed) == set(direct_dependencies(repository))


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


def test_a_conda_environment_gets_the_package_that_the_run_has(repository, tmp_path):
    """The script that Snakemake runs in a new environment, here one of venv, in a folder without a clone."""
    environment, outer, empty = (tmp_path / name for name in ("environment", "outer", "empty"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    outer.mkdir()
    (outer / "lungddpm").write_text(f"#!{sys.executable}\n")
    (outer / "lungddpm").chmod(0o755)
    empty.mkdir()
    variables = {**os.environ, "PATH": os.pathsep.join([str(environment / "bin"), str(outer), os.environ["PATH"]])}
    script = repository / "envs/lungddpm.post-deploy.sh"
    subprocess.run(["sh", script], cwd=empty, env={**variables, "PYTHONPATH": str(repository)}, check=True)

    del variables["PATH"]
    variables.pop("PYTHONPATH", None)
    command = environment / "bin/lungddpm"
    where = [environment / "bin/python", "-c", "import lungddpm.cli; print(lungddpm.cli.__file__)"]
    runs = {
        name: subprocess.run(each, cwd=empty, env=variables, capture_output=True, text=True, check=True).stdout
        for name, each in {
            "version": [command, "--version"],
            "demo": [command, "config", "validate"],
            "where": where,
        }.items()
    }
    assert runs["version"] == f"lungddpm {metadata.version('lungddpm')}\n"
    assert "Arms: real, " in runs["demo"]
    assert runs["where"].startswith(str(packages))


CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2027-01-02\n"
CITATION = "cff-version: 1.2.0\nversion: 1.2.3\ndate-released: 2027-01-02\n"


@pytest.mark.parametrize(
    ("tag", "changelog", "citation", "says"),
    [
        ("v1.2.3", CHANGELOG, CITATION, ""),
        ("1.2.3", CHANGELOG, CITATION, "is not v and a version"),
        ("v1.2.3", CHANGELOG.replace("1.2.3", "1x2.3"), CITATION, "CHANGELOG.md: has no heading"),
        ("v1.2.3", CHANGELOG, CITATION.replace("1.2.3", "1.2x3"), "CITATION.cff: its version is not 1.2.3"),
        ("v1.2.4", CHANGELOG, CITATION, "CHANGELOG.md: has no heading '## [1.2.4] - <date>'"),
        ("v1.2.3", CHANGELOG, CITATION.replace("1.2.3", "1.2.2"), "CITATION.cff: its version is not 1.2.3"),
        ("v1.2.3", CHANGELOG, CITATION.partition("date")[0], "CITATION.cff: has no date-released"),
    ],
)
def test_a_release_needs_its_version_in_changelog_and_citation(repository, tmp_path, tag, changelog, citation, says):
    (tmp_path / ".ci").mkdir()
    shutil.copy(repository / ".ci/check-release", tmp_path / ".ci")
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    (tmp_path / "CITATION.cff").write_text(citation)
    run = subprocess.run([tmp_path / ".ci/check-release", tag], capture_output=True, text=True, check=False)
    assert (run.returncode == 0) is (says == "")
    assert says in run.stderr


PYTHON_THAT_MAKES_A_PIP = """#!/bin/sh
if [ "$1" = -m ]; then
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\necho "$*" > "$0.arguments"\\n' > "$3/bin/pip"
    chmod +x "$3/bin/pip"
fi
"""


@pytest.mark.parametrize("on_terminal", [True, False])
def test_set_up_shows_progress_on_a_terminal_and_is_quiet_in_a_log(repository, tmp_path, on_terminal):
    python = tmp_path / "python"
    python.write_text(PYTHON_THAT_MAKES_A_PIP)
    python.chmod(0o755)
    environment = tmp_path / "environment"
    command = ["make", f"VENV={environment}", f"PYTHON={python}", f"{environment}/.ready"]
    reader, writer = pty.openpty() if on_terminal else os.pipe()
    subprocess.run(command, cwd=repository, stdout=writer, check=True)
    os.close(writer)
    os.close(reader)
    arguments = (environment / "bin/pip.arguments").read_text().split()
    assert ("--quiet" in arguments) is not on_terminal
    assert arguments[-4:] == ["--constraint", "constraints.txt", "--editable", ".[docs,test]"]


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
    extras = ("test", "docs", "dicom", "lungmask", "totalsegmentator", "idc")
    # Tests need the library of an extra, too.
    assert list(listed) == list(dict.fromkeys(direct_dependencies(repository, *extras)))
    assert {name: version for name, (version, _) in listed.items()} == {name: pins(repository)[name] for name in listed}
    optional = set(direct_dependencies(repository, *extras)) - set(direct_dependencies(repository, "test", "docs"))
    for name in set(listed) - optional:
        assert listed[name][1] == licence_of(name), name


def test_the_page_of_dependencies_has_every_extra(repository):
    page = (repository / "docs/reference/dependencies.md").read_text()
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    rows = dict(re.findall(r"^\| `lungddpm\[(\w+)\]` \| (.+?) \|", page, re.MULTILINE))
    assert set(rows) == set(project["optional-dependencies"])
    for extra in set(rows) - {"test"}:
        named = [normal(name) for name in rows[extra].split(", ")]
        assert named == [normal(re.match(r"[\w.-]+", text)[0]) for text in project["optional-dependencies"][extra]]


def jobs_of(repository, workflow):
    """The jobs of a workflow of GitHub, by name."""
    return yaml.safe_load((repository / f".github/workflows/{workflow}.yml").read_text())["jobs"]


def commands_of(job):
    """What a job runs, in order."""
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", ["ci", "nightly", "release"])
def test_no_job_on_github_runs_for_hours_or_installs_cuda(repository, workflow):
    text = yaml.safe_load((repository / f".github/workflows/{workflow}.yml").read_text())
    for job in text["jobs"].values():
        assert job["timeout-minutes"] <= 180
    assert text["env"]["PIP_EXTRA_INDEX_URL"] == "https://download.pytorch.org/whl/cpu"
    # A pin with a local version (2.0+cu130) would refuse the CPU build.
    assert "+" not in pins(repository)["torch"] + pins(repository)["torchvision"]


def test_the_package_claims_the_versions_of_python_that_are_tested(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert set(claimed) <= set(jobs_of(repository, "ci")["test"]["strategy"]["matrix"]["python"])
    assert project["requires-python"] == f">={claimed[0]}"


def test_continuous_integration_on_github_runs_what_the_local_one_runs(repository):
    local = re.findall(r"^(?:exec )?make (\S+)$", (repository / ".ci/run").read_text(), re.MULTILINE)
    assert local == ["test", "dist"]
    commands = {command for job in jobs_of(repository, "ci").values() for command in commands_of(job)}
    assert commands == {"make lint", "make pytest", "make dist", "make docs-site"}
    assert re.search("^test: pytest lint$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert any("make test-slow" in command for command in commands_of(jobs_of(repository, "nightly")["slow"]))


def test_the_nightly_run_can_mount_start_slurm_and_open_a_browser(repository):
    job = jobs_of(repository, "nightly")["slow"]
    # Root by default; Debian, as its package of Chromium is not a snap.
    assert job["container"]["image"].endswith("-bookworm")
    assert "--privileged" in job["container"]["options"].split()
    safe, install, run, check = commands_of(job)
    assert "safe.directory" in safe
    assert {"slurm-wlm", "munge", "chromium", "git", "make"} <= set(install.split())
    assert run == 'PYTEST_ADDOPTS="-r s" make test-slow | tee slow.log'
    # The default shell of a container has no pipefail: it would take the exit code of tee.
    assert next(step for step in job["steps"] if step.get("run") == run)["shell"] == "bash"
    assert check == ".ci/nothing-skipped slow.log"


@pytest.mark.parametrize(
    ("reason", "passes"),
    [
        ("no munged: install the Debian packages slurm-wlm and munge", False),
        ("Slurm does not run on this machine:\nmunged: no key", False),
        ("real data not found in /somewhere; set LUNGDDPM_TEST_DATA", True),
        (None, True),
    ],
)
def test_a_skipped_test_fails_the_nightly_run_unless_it_needs_real_scans(repository, tmp_path, reason, passes):
    skip = "" if reason is None else f"import pytest\ndef test_two():\n    pytest.skip({reason!r})\n"
    (tmp_path / "test_made_up.py").write_text(f"def test_one():\n    pass\n{skip}")
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-n2", "-p", "no:cacheprovider", tmp_path]
    options = {**os.environ, "PYTEST_ADDOPTS": "-r s"}
    shown = subprocess.run(pytest_command, cwd=tmp_path, env=options, check=True, capture_output=True, text=True).stdout
    (tmp_path / "slow.log").write_text(shown)
    check = [repository / ".ci/nothing-skipped", tmp_path / "slow.log"]
    assert (subprocess.run(check, check=False, capture_output=True).returncode == 0) is passes


def test_a_release_is_built_from_its_tag_and_has_the_constraints(repository):
    (job,) = jobs_of(repository, "release").values()
    check, build, compare, publish = commands_of(job)
    assert check == '.ci/check-release "$GITHUB_REF_NAME"'
    assert build == "make dist"
    assert publish.startswith('gh release create "$GITHUB_REF_NAME" --verify-tag ')
    assert publish.endswith(" build/dist/* constraints.txt")
    assert compare.startswith("ls build/dist/")


@pytest.mark.parametrize(("tag", "passes"), [("v1.2.3", True), ("v1.2.4", False), ("v1.2", False)])
def test_a_release_whose_wheel_has_another_version_fails(repository, tmp_path, tag, passes):
    (job,) = jobs_of(repository, "release").values()
    (tmp_path / "build/dist").mkdir(parents=True)
    (tmp_path / "build/dist/lungddpm-1.2.3-py3-none-any.whl").touch()
    variables = {**os.environ, "GITHUB_REF_NAME": tag}
    run = subprocess.run(
        ["bash", "-e", "-c", commands_of(job)[2]], cwd=tmp_path, env=variables, capture_output=True, check=False
    )
    assert (run.returncode == 0) is passes


def test_clean_leaves_only_what_git_has(repository, tmp_path):
    shutil.copy(repository / "Makefile", tmp_path)
    for name in ("README.md", "Readings.csv", ".lock", ".plan.json", "cases/cases.tsv"):
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).touch()
    (tmp_path / ".snakemake").mkdir()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["Makefile", "README.md", "results"]


@pytest.mark.parametrize("target", ["dist", "docs-site"])
def test_a_target_that_takes_a_while_announces_what_it_does(repository, tmp_path, target):
    (tmp_path / ".ready").touch()
    os.utime(tmp_path / ".ready", (2**32, 2**32))  # newer than what it depends on
    command = ["make", "--dry-run", "--no-print-directory", f"VENV={tmp_path}", target]
    lines = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[0].startswith('echo "Building ')


def test_pinned_versions_install_on_the_oldest_python_that_is_supported(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    needed = {}
    for name, version in pins(repository).items():
        with suppress(metadata.PackageNotFoundError):  # of another platform or extra
            found = metadata.metadata(name)
            if found["Version"] == version:
                needed[name] = found["Requires-Python"] or ""
    assert len(needed) > 100
    assert {name: python for name, python in needed.items() if oldest not in SpecifierSet(python)} == {}
