"""Structure sets: readers' contours as DICOM RTSTRUCT objects, in mm, instead of outlines in XML.

pydicom reads them, scikit-image fills them. A voxel belongs to a region if its centre is inside the contour or on it:
planning systems draw between voxels, converters of masks along the centres of the outermost ones. Of several contours
on a slice, the inner ones are holes (even-odd rule).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.sources import Region
from lungddpm.sources.lidc.dicom import COPY_AGAIN
from lungddpm.sources.lidc.objects import ON_GRID, Marked, annotated, other_grid, problem_of_header, read_object, region
from lungddpm.sources.lidc.slices import Stack

if TYPE_CHECKING:
    import pydicom

RTSTRUCT = "RTSTRUCT"
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_DECIMALS = 3
"""Of coordinates in pixels, so that a point on a voxel's centre stays there in spite of decimals in mm."""
_HEADER = [
    "SOPInstanceUID",
    "StructureSetROISequence",
    "ReferencedFrameOfReferenceSequence",
]


def read_structures(path: Path) -> Marked:
    """Read the header of an RTSTRUCT object.

    Raises:
        ExcludedCaseError: the file cannot be read.
    """
    dataset = read_object(path, only=_HEADER)
    try:
        named = [
            str(series.SeriesInstanceUID)
            for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []
            for study in frame.get("RTReferencedStudySequence") or []
            for series in study.get("RTReferencedSeriesSequence") or []
        ]
        rois = dataset.get("StructureSetROISequence") or []
        numbers = [int(roi.ROINumber) for roi in rois]
        texts = [[str(roi.get("ROIName", "")), str(roi.get("ROIDescription", ""))] for roi in rois]
        found = [annotated(of_roi) for of_roi in texts]
        return Marked(
            uid=str(dataset.get("SOPInstanceUID", "")),
            series_uid=named[0] if named else "",
            parts={number: each for number, each in zip(numbers, found, strict=True) if each},
            others=tuple(of_roi[0] for of_roi, each in zip(texts, found, strict=True) if not each),
            problem=problem_of_header(named, numbers, "ROIs"),
        )
    except Exception as error:  # damaged bytes make pydicom fail in any of its functions
        raise ExcludedCaseError(path, f"cannot be read as DICOM RTSTRUCT ({error})", COPY_AGAIN) from None


def structures_in(path: Path, stack: Stack) -> list[tuple[str, Region]]:
    """The annotation id and the voxels of every ROI of an RTSTRUCT object with an annotation.

    Raises:
        ExcludedCaseError: the object is damaged, or an ROI is empty, open, or not on the slices.
    """
    parts, dataset = read_structures(path).parts, read_object(path)
    voxels: dict[int, list[np.ndarray]] = {number: [] for number in parts}
    polygons: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for roi, points_mm in _contours(path, dataset, parts):
        k, points = _on_slice(path, roi, points_mm, stack)
        polygons[roi, k].append(points)
    for (roi, k), on_slice in polygons.items():
        voxels[roi].append(np.insert(_filled(on_slice), 2, k, axis=1))
    return [(parts[roi][1], region(path, f"ROI {roi}", found, stack)) for roi, found in voxels.items()]


def _contours(path: Path, dataset: pydicom.Dataset, rois: Container[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The number of the ROI and the points (n, 3) of every contour of these ROIs; mm, LPS."""
    for of_roi in dataset.get("ROIContourSequence") or []:
        try:
            roi = int(of_roi.ReferencedROINumber)
            if roi not in rois:
                continue
            contours = [
                (str(one.get("ContourGeometricType", "")), np.array(one.ContourData, float).reshape(-1, 3))
                for one in of_roi.get("ContourSequence") or []
            ]
        except Exception as error:  # damaged bytes make pydicom fail in any of its functions
            raise ExcludedCaseError(path, f"has contours that cannot be read ({error})", COPY_AGAIN) from None
        for kind, points_mm in contours:
            if kind not in _CLOSED or len(points_mm) < 3:
                problem = f"has a contour in its ROI {roi} that is not closed ({kind}, {len(points_mm)} points)"
                raise ExcludedCaseError(path, problem, "Export closed planar contours.")
            yield roi, points_mm


def _on_slice(path: Path, roi: int, points_mm: np.ndarray, stack: Stack) -> tuple[int, np.ndarray]:
    """The slice of a contour and its points in pixels, (n, 2): column, row."""
    k, gaps = stack.nearest_slice(points_mm)
    if not (np.abs(gaps) <= ON_GRID).all():
        raise other_grid(path, f"a contour of its ROI {roi} does not lie on a slice")
    pixels = np.round(stack.pixels_of(points_mm, k), _DECIMALS)
    if not ((pixels >= -0.5) & (pixels <= np.array(stack.size[:2]) - 0.5)).all():
        raise other_grid(
            path, f"a contour of its ROI {roi} reaches beyond the {stack.size[0]} x {stack.size[1]} pixels"
        )
    return k, pixels


def _filled(polygons: list[np.ndarray]) -> np.ndarray:
    """The pixels (n, 2) inside polygons on one slice, by the even-odd rule, and on their edges."""
    from skimage.measure import grid_points_in_poly

    # The same contour twice would otherwise be its own hole.
    distinct = {points.tobytes(): points for points in polygons}.values()
    low = np.floor(np.min([points.min(axis=0) for points in distinct], axis=0)).astype(int)
    high = np.ceil(np.max([points.max(axis=0) for points in distinct], axis=0)).astype(int) + 1
    inside, on_edge = np.zeros(high - low, bool), np.zeros(high - low, bool)
    for points in distinct:
        # 0: outside, 1: inside, 2: vertex, 3: edge.
        kinds = grid_points_in_poly(inside.shape, points - low, binarize=False)
        inside ^= kinds == 1
        on_edge |= kinds > 1
    return np.argwhere(inside | on_edge) + low
