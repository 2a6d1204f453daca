"""The phantom cohort: procedural chest CT with exact ground truth, written and read in the format of LIDC-IDRI.

A patient is simple compared with a real one (one value per tissue; no disease except nodules), but every lung, vessel
and nodule voxel is known. It is made in this order, one module per step:

    anatomy, skeleton    a seed draws a physique; surfaces in mm follow from it, and tissues are painted between them
    vessels              trees of arteries and veins grow into the lungs, bronchi beside them
    nodules              nodules are placed in the lungs, and decoys that readers mark as well
    scanner              the content of each voxel becomes HU on the scan's grid, with noise
    patient              `thorax` does all of this and keeps the truth
    readers              four readers outline the nodules, each slightly differently
    cohort               `write_cohort` writes DICOM slices and the readers' XML file, one folder per patient

(`shapes` holds the geometry that they share.) Coordinates inside this package are LPS millimetres of the patient: x to
the patient's left, y to the back, z to the head, the origin in the midline near the lowest edge of the lungs. Its
output is RAS.
"""

from __future__ import annotations

from pathlib import Path

from lungddpm.sources import Size

# A cohort is read like LIDC-IDRI.
from lungddpm.sources.lidc import find_series, load_scan
from lungddpm.sources.phantom.settings import Phantom as Settings

__all__ = ["CITATION", "TITLE", "Settings", "find_series", "load_scan", "simulate", "size"]

TITLE = "procedural chest CT with exact truth, built in"
CITATION = "None: computed by lungddpm."


def size(settings: Settings) -> Size:
    """As many scans as patients; a chest is about 310 mm high."""
    return Size(settings.patients, settings.matrix**2 * 310 / settings.slice_mm, "the config")


def simulate(settings: Settings, seed: int, output: Path, threads: int = 1) -> None:
    """Write the cohort; see `write_cohort`."""
    from lungddpm.sources.phantom.cohort import write_cohort

    write_cohort(settings, seed, output, threads)
