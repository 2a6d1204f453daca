"""Location of the workflow, default config, overlays and profiles: in a clone, or inside a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from lungddpm.core.errors import OutputError

TO_EDIT = ("config.yaml", "config", "profiles", "workflow/schemas")
"""The part of the shipped folder that users edit, and the schema with which editors complete keys."""


def shipped_folder() -> Path:
    """Folder that holds `workflow/Snakefile`, `config.yaml`, `config/`, `profiles/` and `envs/`.

    In a wheel these are inside the package (pyproject.toml puts them there), in a clone next to it.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "shipped"
    return inside if inside.is_dir() else package.parent


def default_config(folder: Path = Path()) -> Path:
    """The config that a run in this folder starts from: its own config.yaml, or else the shipped one (the demo)."""
    own = folder / "config.yaml"
    return own if own.exists() else shipped_folder() / "config.yaml"


def copy_to_edit(folder: Path) -> list[Path]:
    """Copy the default config, the overlays and the profiles into a folder.

    Args:
        folder: created if it does not exist.

    Returns:
        The copied files, relative to the folder.

    Raises:
        OutputError: the folder is not writable, or already has one of them; then nothing is copied.
    """
    for name in TO_EDIT:
        if (folder / name).exists():
            raise OutputError(folder / name, "already exists and is not overwritten", "Choose another folder.")
    source = shipped_folder()
    found = [path for name in TO_EDIT for path in (source / name, *(source / name).rglob("*"))]
    copied = sorted(path.relative_to(source) for path in found if path.is_file())
    for path in copied:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return copied
