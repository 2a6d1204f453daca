"""Control: the reference's own CT. Shows the gain from as many more real cases."""

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
    """Needs no weights."""
    return Generator(make=lambda tasks: [copy_reference(task) for task in tasks])


def copy_reference(task: Task) -> np.ndarray:
    """The reference's HU: (x, y, z) int16."""
    return task.reference.array.astype(np.int16)
