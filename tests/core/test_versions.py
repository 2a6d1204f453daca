"""The commit of a source checkout."""

import os
import subprocess

import pytest

from lungddpm.core.versions import git_commit


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A function that runs git in a folder of its own, without anybody's settings; its first argument is a command."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]

    def git(*arguments):
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    return git


@pytest.fixture
def package(tmp_path):
    """The folder of a package of one file, not yet under git."""
    folder = tmp_path / "made_up"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    return folder


@pytest.fixture
def checkout(package, git):
    """The same, committed."""
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    return package


def test_a_checkout_has_its_commit(checkout, git):
    assert git_commit(checkout) == git("rev-parse", "HEAD")
    git("commit", "--quiet", "--allow-empty", "--message", "two")
    assert git_commit(checkout) == git("rev-parse", "HEAD")


def test_changes_in_the_package_are_marked_and_others_are_not(checkout, git):
    (checkout.parent / "notes.txt").write_text("beside the package")
    assert git_commit(checkout) == git("rev-parse", "HEAD")
    (checkout / "__init__.py").write_text("changed = 1")
    assert git_commit(checkout) == git("rev-parse", "HEAD") + " with changes"


def test_without_a_checkout_there_is_no_commit(package, git):
    assert git_commit(package) is None
    # Nor in an environment that somebody keeps inside another repository, whose files git ignores.
    git("init", "--quiet")
    (package.parent / ".gitignore").write_text("made_up/")
    git("add", ".gitignore")
    git("commit", "--quiet", "--message", "one")
    assert git_commit(package) is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit(checkout) is None
