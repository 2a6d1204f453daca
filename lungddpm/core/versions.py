"""Installed versions of the libraries that results depend on."""

from __future__ import annotations

import importlib.metadata
import platform

from lungddpm import __version__

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
