"""The phantom cohort: procedural chest CT with exact ground truth, written as LIDC-IDRI would be and read as it is.

A patient is plain beside a real one (one tissue, one value; no disease but nodules), but every lung, vessel and nodule
voxel is known. It comes about in this order, a module a step:

    anatomy, skeleton    a seed draws a physique; surfaces in mm follow from it, and tissues are painted between them
    vessels              trees of arteries and veins grow into the lungs, bronchi beside them
    nodules              nodules are placed in the lungs, and decoys that readers mark beside them
    scanner              what each voxel holds becomes HU on the scan's grid, with noise
    patient              `thorax` does all of this and keeps the truth
    readers              four readers outline the nodules, a little differently each
    cohort               `run_phantom` writes DICOM slices and the readers' XML file, one folder per patient

(`shapes` holds the geometry that they share.) Coordinates inside this package are LPS millimetres of the patient: x to
the patient's left, y to the back, z to the head, the origin in the midline near the lowest edge of the lungs. What
leaves it is RAS.
"""

# Reading a cohort is reading LIDC-IDRI; what makes one is imported from its module, so that indexing stays quick.
from lungddpm.sources.lidc import find_series, load_scan

__all__ = ["find_series", "load_scan"]
