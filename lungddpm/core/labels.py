"""The labels of volumes: the only place that defines these numbers."""

from enum import IntEnum


class Label(IntEnum):
    """Values of a layout volume (uint8). Lung excludes nodules and vessels; nodule takes precedence over both."""

    BACKGROUND = 0
    LUNG = 1
    NODULE = 2
    VESSEL = 3


RIGHT, LEFT = 1, 2
"""Values of a lung mask (uint8, 0 outside): the patient's right lung (larger x in RAS+) and left lung."""
