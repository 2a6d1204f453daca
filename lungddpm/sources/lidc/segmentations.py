"""Segmentations: readers' masks as DICOM SEG objects, instead of outlines in XML.

The Imaging Data Commons (IDC) serves LIDC-IDRI in this form: one object per reader and nodule, on the CT's own grid,
whose segment is labelled "Nodule 1 - Annotation IL057_127364". Fedorov et al., Medical Physics 47:5953, 2020, doi
10.1002/mp.14445.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.sources import READERS, Contour, Region
from lungddpm.sources.lidc.dicom import COPY_AGAIN, frame_value
from lungddpm.sources.lidc.headers import LARGEST_NUMBER
from lungddpm.sources.lidc.objects import ON_GRID, Marked, annotated, other_grid, problem_of_header, read_object, region
from lungddpm.sources.lidc.slices import Stack

if TYPE_CHECKING:
    import pydicom

SEG = "SEG"
_NAMED = re.compile(r"(.*?)(\d{0,18})", re.DOTALL)
_SAME_READER = 100
"""Numeric ids belong to one reader as long as no gap is larger. Of the release's 2,651 nodules, 23 then have two
annotations of one reader, with 200 already 28, and with 1,000 89; according to the readers' XML, 17 do."""
_HEADER = [
    "SOPInstanceUID",
    "SeriesDescription",
    "SegmentationType",
    "SegmentSequence",
    "ReferencedSeriesSequence",
]


def read_segmentation(path: Path) -> Marked:
    """Read the header of a SEG object.

    Raises:
        ExcludedCaseError: the file cannot be read.
    """
    dataset = read_object(path, only=_HEADER)
    try:
        named = [str(one.get("SeriesInstanceUID", "")) for one in dataset.get("ReferencedSeriesSequence") or []]
        described = dataset.get("SegmentSequence") or []
        # The name of a series with one segment is that of its segment.
        shared = [str(dataset.get("SeriesDescription", ""))] if len(described) == 1 else []
        numbers = [int(segment.SegmentNumber) for segment in described]
        texts = [
            [str(one.get("SegmentLabel", "")), str(one.get("SegmentDescription", "")), *shared] for one in described
        ]
        found = [annotated(of_segment) for of_segment in texts]
        return Marked(
            uid=str(dataset.get("SOPInstanceUID", "")),
            series_uid=named[0] if named else "",
            parts={number: each for number, each in zip(numbers, found, strict=True) if each},
            others=tuple(of_segment[0] for of_segment, each in zip(texts, found, strict=True) if not each),
            problem=_problem_of_kind(dataset) or problem_of_header(named, numbers, "segments"),
        )
    except Exception as error:  # damaged bytes make pydicom fail in any of its functions
        raise ExcludedCaseError(path, f"cannot be read as DICOM SEG ({error})", COPY_AGAIN) from None


def _problem_of_kind(dataset: pydicom.Dataset) -> tuple[str, str] | None:
    if dataset.get("SegmentationType") != "BINARY":
        return "has fractions or labels instead of bits", "Export it as a binary segmentation."
    return None


def repeats(annotations: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The annotation ids of one inferred reader (see `readers_of`) for a nodule that has several of that reader.

    Args:
        annotations: number of the nodule and annotation id, of one scan.

    Returns:
        Ids by number of the nodule.
    """
    readers = readers_of(name for _, name in annotations)
    of_reader: dict[tuple[str, int], list[str]] = defaultdict(list)
    for nodule, name in dict.fromkeys(annotations):
        of_reader[nodule, readers[name]].append(name)
    return {nodule: names for (nodule, _), names in of_reader.items() if len(names) > 1}


def name_readers(annotations: Sequence[tuple[str, str]]) -> bool:
    """Whether ids seem to name readers instead of annotations, where `repeats` has found any.

    That is so if an id is that of several nodules, or no nodule with several annotations has several readers. Neither
    is the case in any scan of LIDC-IDRI, although 22 have a nodule with several annotations of one reader.

    Args:
        annotations: number of the nodule and annotation id, of one scan.
    """
    readers = readers_of(name for _, name in annotations)
    names_of, readers_of_nodule = defaultdict(set), defaultdict(set)
    for nodule, name in annotations:
        names_of[nodule].add(name)
        readers_of_nodule[nodule].add(readers[name])
    is_shared = sum(map(len, names_of.values())) > len(readers)
    several = [nodule for nodule, names in names_of.items() if len(names) > 1]
    return is_shared or all(len(readers_of_nodule[nodule]) == 1 for nodule in several)


def readers_of(annotation_ids: Iterable[str]) -> dict[str, int]:
    """Number the readers of one scan by the ids of their annotations.

    LIDC's ids do not name readers. But each reader's workstation had its own numbering: ids of one reader differ only
    in their last number ("IL057_127364", "Nodule 001"), or are numbers that are close to each other.

    Args:
        annotation_ids: of one scan.

    Returns:
        Readers from 0, by id.
    """
    ways: dict[str, int] = {}
    readers: dict[str, int] = {}
    last, chain = 0, 0
    for name, number, annotation_id in sorted(_parts(annotation_id) for annotation_id in set(annotation_ids)):
        if not name:
            chain += number - last > _SAME_READER
            last = number
            name = str(chain)
        readers[annotation_id] = ways.setdefault(name, len(ways))
    return readers


def most_readers(annotation_ids: Iterable[str]) -> int:
    """How many people can have read one scan, by the ids of their annotations: at least LIDC's four.

    Only prefixes name people: all plain numbers count as those of one, because `readers_of` can take one for two.
    """
    return max(READERS, len({_parts(annotation_id)[0] for annotation_id in annotation_ids}))


def outlines(region: Region) -> tuple[Contour, ...]:
    """The voxels around a region, slice by slice: outside voxels that share an edge with an inside voxel.

    They are not ordered along the contour.
    """
    from scipy.ndimage import binary_dilation, generate_binary_structure

    mask = np.pad(region.mask, ((1, 1), (1, 1), (0, 0)))
    around = binary_dilation(mask, generate_binary_structure(2, 1)[:, :, np.newaxis]) & ~mask
    x, y, z = region.corner
    first = np.array([x - 1, y - 1])  # of the padded mask
    return tuple(
        Contour(z + k, np.argwhere(around[:, :, k]) + first) for k in range(mask.shape[2]) if around[:, :, k].any()
    )


def _parts(annotation_id: str) -> tuple[str, int, str]:
    """The prefix of an id before its final number, that number, and the id."""
    found = _NAMED.fullmatch(annotation_id)
    assert found is not None  # it matches every text
    return found[1], int(found[2] or 0), annotation_id


def segments_in(path: Path, stack: Stack) -> list[tuple[str, Region]]:
    """The annotation id and the voxels of every segment of a SEG object with an annotation.

    Raises:
        ExcludedCaseError: the object is damaged, or a segment is empty or not on the grid of the slices.
    """
    named = read_segmentation(path).parts
    dataset = read_object(path)
    frames = _frames(path, dataset)
    voxels: dict[int, list[np.ndarray]] = {number: [] for number in named}
    for number, frame in enumerate(frames):
        segment, position, steps = _describe_frame(path, dataset, number)
        if segment not in voxels or not frame.any():
            continue
        place = _place(path, number, position, steps, frame.shape, stack)
        # numpy's index of a frame is (row, column).
        voxels[segment].append(np.insert(np.argwhere(frame)[:, ::-1], 2, 0, axis=1) + place)
    return [(named[number][1], region(path, f"segment {number}", found, stack)) for number, found in voxels.items()]


def _describe_frame(path: Path, dataset: pydicom.Dataset, frame: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The segment of a frame, the position of its first pixel (3,), and the steps to the next column and row (2, 3).

    Lengths are in mm, LPS.
    """
    try:
        segment = frame_value(dataset, frame, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
        position = frame_value(dataset, frame, "PlanePositionSequence", "ImagePositionPatient")
        orientation = frame_value(dataset, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
        row_mm, column_mm = frame_value(dataset, frame, "PixelMeasuresSequence", "PixelSpacing")
        steps = np.array(orientation, float).reshape(2, 3) * [[float(column_mm)], [float(row_mm)]]
        return int(segment), np.array(position, float).reshape(3), steps
    except Exception:  # damaged bytes make pydicom fail in any of its functions
        problem = f"does not give segment and position of its frame {frame + 1}"
        raise ExcludedCaseError(path, problem, COPY_AGAIN) from None


def _place(
    path: Path, frame: int, position: np.ndarray, steps: np.ndarray, shape: tuple[int, ...], stack: Stack
) -> tuple[int, int, int]:
    """Index of a frame's first pixel in the stack; see `_describe_frame`."""
    lengths = np.linalg.norm(stack.steps_mm, axis=1)
    drift = np.linalg.norm(steps - stack.steps_mm, axis=1) * shape[::-1]
    if not (drift <= ON_GRID * lengths).all():
        raise other_grid(path, "its pixels have a different size or direction")
    k, (gap,) = stack.nearest_slice(position[np.newaxis])
    if not abs(gap) <= ON_GRID:
        raise other_grid(path, f"its frame {frame + 1} does not lie on a slice")
    (shift,) = stack.pixels_of(position[np.newaxis], k)
    if not (np.abs(shift) < LARGEST_NUMBER).all():
        raise other_grid(path, f"its frame {frame + 1} is far away")
    if not (np.abs(shift - np.rint(shift)) <= ON_GRID).all():
        raise other_grid(path, "it is shifted by a fraction of a pixel")
    return int(np.rint(shift[0])), int(np.rint(shift[1])), k


def _frames(path: Path, dataset: pydicom.Dataset) -> np.ndarray:
    """(frames, rows, columns) of 0 and 1."""
    try:
        return dataset.pixel_array.reshape(-1, int(dataset.Rows), int(dataset.Columns))
    except Exception as error:  # damaged bytes make the decoders fail in any of their functions
        raise ExcludedCaseError(path, f"pixels cannot be decoded ({error})", COPY_AGAIN) from None
