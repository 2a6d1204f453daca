"""Control: the reference with constant lungs. Shows the effect of the pasted background alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lungddpm.config.sections import GeneratorConfig, GeneratorSettings
from lungddpm.core.errors import InputError
from lungddpm.core.labels import Label
from lungddpm.generators import JITTERED, OWN, Generator, Task

TITLE = "Control: lungs of one constant HU in the reference"
CITATION = "None: the reference's background around lungs of constant HU."
Settings = GeneratorSettings
LAYOUTS = OWN, JITTERED


def load(config: GeneratorConfig[Settings], weights: Path | None, device: str) -> Generator:
    """Needs no weights."""
    return Generator(make=lambda tasks: [fill_with_mean_lung(task) for task in tasks])


def fill_with_mean_lung(task: Task) -> np.ndarray:
    """The reference with every labelled voxel, including nodules and vessels, at the mean HU of its lung voxels.

    Returns:
        (x, y, z) int16 HU.

    Raises:
        InputError: the layout has no lung voxel.
    """
    layout, hu = task.layout.array, task.reference.array.astype(np.int16)
    lung = hu[layout == Label.LUNG]
    if not lung.size:
        raise InputError("paste_constant", "got a layout without lung", "Exclude the reference, or fix its layout.")
    return np.where(layout == Label.BACKGROUND, hu, np.int16(np.rint(lung.mean(dtype=np.float64))))
