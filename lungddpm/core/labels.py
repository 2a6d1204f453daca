"""The labels of a layout: the numbers live here and nowhere else."""

from enum import IntEnum


class Label(IntEnum):
    """Values of a layout volume (uint8). Lung excludes nodules and vessels; nodule wins over both."""

    BACKGROUND = 0
    LUNG = 1
    NODULE = 2
    VESSEL = 3
