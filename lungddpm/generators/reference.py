"""Control: the reference's own CT. What as many more real cases would have given."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lungddpm.config.sections import GeneratorConfig, GeneratorSettings
from lungddpm.generators import OWN, Generator, Task

TITLE = "Control: the reference's own CT"
CITATION = "None: the reference CT itself, unchanged."
Settings = GeneratorSettings
LAYOUTS = OWN, OWN


def load(config: GeneratorConfig[Settings], weights: Path | None, device: str) -> Generator:
    """Ready at once; needs nothing."""
    return Generator(make=lambda tasks: [copy_reference(task) for task in tasks])


def copy_reference(task: Task) -> np.ndarray:
    """The reference's HU: (x, y, z) int16."""
    return task.reference.array.astype(np.int16)
