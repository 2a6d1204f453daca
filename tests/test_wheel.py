"""The wheel alone: what a person has after `pip install`, in an empty folder and without a clone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCES = (
    ".gitattributes",
    ".git_archival.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "config.yaml",
    "lungddpm",
    "workflow",
    "config",
    "profiles",
    "envs",
)


def copy_sources(repository, folder):
    """What a wheel is built from, without what git ignores."""
    folder.mkdir()
    for name in SOURCES:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(repository / name, folder / name)


def build(source, hook, folder):
    """Call the build backend as pip does, without a network; the wheel's path."""
    code = f"import hatchling.build as backend; print(backend.{hook}({str(folder)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    return folder / built.stdout.split()[-1]


@pytest.fixture(scope="session")
def installed(repository, tmp_path_factory):
    """The folder of site-packages that holds the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_sources(repository, folder / "source")
    wheel = build(folder / "source", "build_wheel", folder)
    shutil.rmtree(folder / "source")
    zipfile.ZipFile(wheel).extractall(folder / "site-packages")
    return folder / "site-packages"


@pytest.fixture
def lungddpm(installed, tmp_path):
    """A function that runs the installed command in an empty folder; the jobs of a workflow find it as well."""
    working = tmp_path / "working"
    working.mkdir()

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(installed), "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, "-m", "lungddpm", *arguments], cwd=working, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip

    run.folder = working
    return run


def test_the_wheel_holds_the_workflow_once(installed, repository):
    shipped = installed / "lungddpm/shipped"
    for name in ("workflow", "config", "profiles", "envs"):
        theirs = {p.relative_to(repository / name) for p in (repository / name).rglob("*") if p.is_file()}
        theirs = {path for path in theirs if "__pycache__" not in path.parts}
        assert {p.relative_to(shipped / name) for p in (shipped / name).rglob("*") if p.is_file()} == theirs
    assert (shipped / "config.yaml").read_bytes() == (repository / "config.yaml").read_bytes()
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"lungddpm"}
    assert list(installed.glob("lungddpm/*/templates/*.jinja"))
    assert (installed / "lungddpm/py.typed").is_file()
    assert list(installed.glob("lungddpm/*/*.csv"))


def version_of(wheel):
    return wheel.name.split("-")[1]


def test_files_without_git_can_be_installed(lungddpm):
    run = lungddpm("--version")
    assert (run.returncode, run.stdout) == (0, "lungddpm 0.0.0\n")


def test_the_version_is_that_of_the_tag_in_a_clone_an_sdist_and_an_archive(repository, tmp_path):
    clone = tmp_path / "clone"
    copy_sources(repository, clone)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["tag", "v7.8.9"]):
        subprocess.run(["git", *identity, *command], cwd=clone, check=True, capture_output=True)
    assert version_of(build(clone, "build_wheel", tmp_path)) == "7.8.9"

    sdist = build(clone, "build_sdist", tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert version_of(build(unpacked, "build_wheel", tmp_path / "unpacked")) == "7.8.9"

    archive = tmp_path / "archive.tar"
    subprocess.run(["git", "archive", "--output", archive, "HEAD"], cwd=clone, check=True)
    shutil.unpack_archive(archive, tmp_path / "archived")
    assert version_of(build(tmp_path / "archived", "build_wheel", tmp_path)) == "7.8.9"

    (clone / "lungddpm/new.py").touch()
    subprocess.run(["git", "add", "-A"], cwd=clone, check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "y"], cwd=clone, check=True)
    assert version_of(build(clone, "build_wheel", tmp_path)).startswith("7.8.10.dev1+g")


def test_an_empty_folder_plans_the_demo(lungddpm):
    run = lungddpm("run", "--dry-run")
    assert run.returncode == 0, run.stdout[-3000:]
    assert re.search(r"^train_segmenter +16$", run.stdout, re.MULTILINE)
    assert "shipped/profiles/default for setting default" in run.stdout
    assert not list(lungddpm.folder.glob("results/[!.]*"))
    validated = lungddpm("config", "validate")
    assert validated.returncode == 0, validated.stdout
    assert "Arms: real, " in validated.stdout


@pytest.mark.workflow
def test_an_empty_folder_runs_the_first_stages(lungddpm):
    small = lungddpm.folder / "small.yaml"
    small.write_text("source: {phantom: {patients: 3, matrix: 64, pixel_mm: 5, slice_mm: 20}}\n")
    with small.open("a") as file:
        file.write("roles: {discovery: 1, reference: 1, test: 1}\n")
    run = lungddpm("run", "--configfile", "small.yaml", "--until", "index", "merge_config")
    assert run.returncode == 0, run.stdout[-3000:]
    assert (lungddpm.folder / "results/cases/index.tsv").read_text().count("\n") == 4
    assert (lungddpm.folder / "results/config.json").exists()


def test_init_copies_what_is_edited_and_overwrites_nothing(lungddpm, repository):
    run = lungddpm("init", "mine")
    assert run.returncode == 0, run.stdout
    copied = {
        str(p.relative_to(lungddpm.folder / "mine")) for p in (lungddpm.folder / "mine").rglob("*") if p.is_file()
    }
    assert {
        "config.yaml",
        "config/lidc.yaml",
        "config/paper.yaml",
        "config/rivals.yaml",
        "profiles/slurm/profile.yaml",
    } <= copied
    for name in copied:
        assert (lungddpm.folder / "mine" / name).read_bytes() == (repository / name).read_bytes()
    (lungddpm.folder / "mine/config.yaml").write_text("seed: 7\n")
    refused = lungddpm("init", "mine")
    assert refused.returncode == 2
    assert "config.yaml: already exists and is not overwritten" in refused.stdout
    assert (lungddpm.folder / "mine/config.yaml").read_text() == "seed: 7\n"


def test_an_overlay_and_the_slurm_profile_of_init_are_planned(lungddpm):
    assert lungddpm("init").returncode == 0
    (lungddpm.folder / "paths.yaml").write_text(f"source: {{path: '{lungddpm.folder}'}}\n")
    overlays = ["--configfile", "config/lidc.yaml", "paths.yaml"]
    run = lungddpm("run", "--dry-run", *overlays, "--workflow-profile", "profiles/slurm")
    assert run.returncode == 0, run.stdout[-3000:]
    assert "slurm_partition=main" in run.stdout
    assert re.search(r"^train_segmenter +15$", run.stdout, re.MULTILINE)


def test_a_clone_in_the_working_folder_hides_nothing(lungddpm, installed, repository):
    copy_sources(repository, lungddpm.folder / "lungddpm")
    snakefile = installed / "lungddpm/shipped/workflow/Snakefile"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--snakefile", snakefile]
    run = subprocess.run(command, cwd=lungddpm.folder, env=environment, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    planned = lungddpm("run", "--dry-run")
    assert planned.returncode == 0, planned.stdout[-3000:]


def test_a_folder_of_the_packages_name_does_not_hide_an_editable_install(repository, tmp_path):
    source, installed, working = (tmp_path / name for name in ("source", "installed", "working"))
    copy_sources(repository, source)
    zipfile.ZipFile(build(source, "build_editable", tmp_path)).extractall(installed)
    # A clone is a folder called lungddpm, with the package in another one of that name.
    shutil.copytree(source, working / "lungddpm")
    find = (
        f"import site; site.addsitedir({str(installed)!r}); import lungddpm.config as c, lungddpm.core.shipped as s; "
        "print(c.__file__, s.shipped_folder())"
    )
    # As `python -m snakemake` does, and a PYTHONPATH that leads to where clones lie.
    for python in ([sys.executable, "-S", "-c"], [sys.executable, "-S", "-P", "-c"]):
        libraries = [path for path in sys.path if path.endswith("site-packages")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(working), *libraries])}
        found = subprocess.run(
            [*python, find], cwd=working, env=environment, check=True, capture_output=True, text=True
        )
        module, shipped = map(Path, found.stdout.split())
        assert (module, shipped) == (source / "lungddpm/config/__init__.py", source)
