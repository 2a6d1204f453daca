"""The commit of the code, and installed versions of the libraries that results depend on."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from lungddpm import __version__
from lungddpm.core.code import PACKAGE

LIBRARIES = [
    "torch", "torchvision", "nnunetv2", "diffusers", "accelerate", "snakemake", "monai", "pydicom", "SimpleITK",
    "nibabel", "numpy", "scipy", "pandas", "scikit-image", "scikit-learn", "connected-components-3d", "matplotlib",
    "plotly",
]  # fmt: skip
"""The libraries that a run needs and its results depend on; the manifest records their versions."""


def installed_versions() -> dict[str, str]:
    """Versions of lungddpm, Python and `LIBRARIES`; missing ones are left out."""
    found = {"lungddpm": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(package: Path = PACKAGE) -> str | None:
    """The commit of the running code, marked if its files have changes.

    An editable install keeps the version of the day of its installation; this is the commit of today.

    Args:
        package: folder of the package.

    Returns:
        Forty hexadecimal digits, with " with changes" if the folder differs from them; None if it is not a checkout, or
        git is not installed.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)

    try:
        # An environment inside another repository is not a checkout of this one.
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        commit = git("rev-parse", "HEAD").stdout.strip()
        return f"{commit} with changes" if git("status", "--porcelain", "--", ".").stdout else commit
    except FileNotFoundError:
        return None
