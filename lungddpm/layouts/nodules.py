"""Nodules: from readers' contours, or from labels, to physical nodules in the scan's own index space.

The rules are those of LIDC-IDRI: Armato et al., Medical Physics 38:915-931, 2011, doi 10.1118/1.3528204 (a contour is
the first voxel outside the nodule). Clustering by the smallest distance between contours and the consensus over
readers follow Hancock and Magnan, J. Medical Imaging 3:044504, 2016, doi 10.1117/1.JMI.3.4.044504.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cc3d
import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from skimage.measure import grid_points_in_poly

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.labels import Label
from lungddpm.core.text import plural
from lungddpm.core.volume import Box, Volume, bounding_box, per_axis, resample_upright
from lungddpm.sources import READERS, Annotation, Scan

TOLERANCE_STEP = 0.9
SMALLEST_TOLERANCE_MM = 0.1
_ROUNDING_MM = 1e-3
"""Slice positions in headers are rounded: contours exactly one slice apart must stay linked."""
_STAPLE_ROUNDS = 200
"""It converges within tens of iterations."""


@dataclass(frozen=True)
class Nodule:
    """One physical nodule: a box of the scan and the voxels of the nodule in it."""

    corner: tuple[int, int, int]
    """Index of the box's first voxel in the scan."""
    mask: np.ndarray
    """bool; cropped to the nodule."""
    readers: int = 1
    """Distinct readers who marked it; 1 for labels."""
    flagged: bool = False
    """Whether one reader marked it more than once, in contours that touch: their union is used."""
    characteristics: dict[str, float] = field(default_factory=dict)
    """Median rating over the annotations, e.g. `malignancy`; empty without ratings."""
    untidy: dict[str, int] = field(default_factory=dict)
    """See `untidy_contours`; empty for labels."""

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return int(np.count_nonzero(self.mask))

    @property
    def box(self) -> Box:
        """The box as an index into the scan."""
        return per_axis(slice(first, first + n) for first, n in zip(self.corner, self.mask.shape, strict=True))

    def paste(self, into: np.ndarray, value: int | bool = True) -> None:
        """Set the nodule's voxels in an array of the scan's shape, in place."""
        into[self.box][self.mask] = value

    def volume_in(self, scan: Volume) -> Volume:
        """The nodule as a small separate volume, at its position in the patient."""
        return scan.crop(self.box).like(self.mask)

    def canonical(self, scan: Volume) -> Nodule:
        """The same nodule in the index space of `scan.canonical()`."""
        turned = self.volume_in(scan).canonical()
        corner = np.linalg.solve(scan.canonical().affine, turned.affine)[:3, 3]
        return replace(self, corner=per_axis(int(first) for first in np.rint(corner)), mask=turned.array)

    def upright(self, scan: Volume) -> Nodule:
        """The same nodule in the index space of `resample_upright(scan)`, for a scan in its canonical orientation."""
        mask = np.zeros(scan.shape, bool)
        self.paste(mask)
        moved = resample_upright(scan.like(mask), labels=True).array
        box = bounding_box(moved)
        return replace(self, corner=per_axis(side.start for side in box), mask=moved[box])


def find_nodules(scan: Scan, settings: Layouts) -> tuple[list[Nodule], tuple[str, ...]]:
    """The physical nodules of a scan, from feet to head, and notes on those left out for lack of agreement.

    Contours are clustered and merged by consensus; nodules of fewer than `settings.minimum_readers` distinct readers,
    and those without a voxel at `settings.consensus`, are left out. For labels, every 26-connected component of
    the label `NODULE` is a nodule, whatever the settings.
    """
    nodules, notes = (_labelled_nodules(scan.labels), ()) if scan.labels is not None else _agreed(scan, settings)
    return sorted(nodules, key=lambda nodule: centroid_mm(nodule.volume_in(scan.ct))[::-1].tolist()), notes


def _agreed(scan: Scan, settings: Layouts) -> tuple[list[Nodule], tuple[str, ...]]:
    """The nodules that the readers of a scan agree on, in the order of its annotations, and notes."""
    clusters = [
        cluster
        for cluster in cluster_annotations(scan.annotations, scan.ct.affine, scan.slice_thickness_mm, scan.readers)
        if len({annotation.reader for annotation in cluster}) >= settings.minimum_readers
    ]
    agreed = [consensus(cluster, settings.consensus, settings.consensus_by) for cluster in clusters]
    nodules = [nodule for nodule in agreed if nodule is not None]
    if not (lost := len(agreed) - len(nodules)):
        return nodules, ()
    verbs = ("has", "was") if lost == 1 else ("have", "were")
    where = f"no voxel at layouts.consensus {settings.consensus:g}"
    return nodules, (f"{plural(lost, 'nodule')} {verbs[0]} {where} and {verbs[1]} left out",)


def centroid_mm(mask: Volume) -> np.ndarray:
    """Mean position of a mask's voxels in mm, RAS+, shape (3,)."""
    return mask.affine[:3, :3] @ np.argwhere(mask.array).mean(axis=0) + mask.affine[:3, 3]


def number_voxels(nodules: Sequence[Nodule], shape: tuple[int, int, int]) -> np.ndarray:
    """One array for all nodules of a scan.

    Args:
        nodules: in the scan's index space; if two overlap, the smaller one takes precedence.
        shape: of the scan.

    Returns:
        uint8 of `shape`: 0, or the nodule's place in `nodules`, from 1.

    Raises:
        ExcludedCaseError: there are more nodules than uint8 can number.
    """
    most = np.iinfo(np.uint8).max
    if len(nodules) > most:
        raise ExcludedCaseError(
            "nodules",
            f"there are {len(nodules)}, but at most {most} can be numbered",
            "Remove specks from the nodule label.",
        )
    numbers = np.zeros(shape, np.uint8)
    for number, nodule in sorted(enumerate(nodules, start=1), key=lambda item: -item[1].voxels):
        nodule.paste(numbers, number)
    return numbers


def cluster_annotations(
    annotations: Sequence[Annotation],
    affine: np.ndarray,
    slice_thickness_mm: float | None = None,
    most_readers: int = READERS,
) -> list[list[Annotation]]:
    """Group the annotations of one scan into physical nodules.

    Two annotations are linked if their contours are within the slice thickness (single linkage). While a cluster has
    more annotations than the scan has readers, or two of one reader, its tolerance is reduced by a tenth, down to
    0.1 mm.

    Args:
        annotations: of one scan.
        affine: (4, 4) of the scan, index -> mm.
        slice_thickness_mm: None: the distance between slices.
        most_readers: of the scan, see `Scan.readers`.

    Returns:
        Clusters in the order of their first annotation.
    """
    if not annotations:
        return []
    if slice_thickness_mm is None:
        slice_thickness_mm = float(np.linalg.norm(affine[:3, 2]))
    distances = _contour_distances_mm(annotations, affine, slice_thickness_mm)
    readers = np.array([annotation.reader for annotation in annotations])
    clusters = []
    open_groups = [(np.arange(len(annotations)), slice_thickness_mm)]
    while open_groups:
        members, tolerance = open_groups.pop()
        _, part = connected_components(distances[np.ix_(members, members)] <= tolerance + _ROUNDING_MM, directed=False)
        for cluster in (members[part == number] for number in range(part.max() + 1)):
            too_many = len(cluster) > most_readers or len(np.unique(readers[cluster])) < len(cluster)
            if too_many and tolerance > SMALLEST_TOLERANCE_MM:
                open_groups.append((cluster, max(tolerance * TOLERANCE_STEP, SMALLEST_TOLERANCE_MM)))
            else:
                clusters.append(cluster)
    return [[annotations[i] for i in cluster] for cluster in sorted(clusters, key=lambda cluster: cluster[0])]


def consensus(cluster: Sequence[Annotation], level: float, by: str = "vote") -> Nodule | None:
    """The voxels marked by at least a share of the nodule's own readers, or with a sufficient STAPLE probability.

    Args:
        cluster: the annotations of one physical nodule.
        level: the share or the probability, above 0, at most 1.
        by: `vote` or `staple`.

    Returns:
        The nodule; None if no voxel reaches the level.
    """
    masks = [annotation_mask(annotation) for annotation in cluster]
    low = np.min([corner for corner, _ in masks], axis=0)
    high = np.max([np.add(corner, mask.shape) for corner, mask in masks], axis=0)
    readers = sorted({annotation.reader for annotation in cluster})
    drawn = np.zeros((len(readers), *(high - low)), bool)
    for annotation, (corner, mask) in zip(cluster, masks, strict=True):
        inside = tuple(slice(first, first + n) for first, n in zip(corner - low, mask.shape, strict=True))
        drawn[readers.index(annotation.reader)][inside] |= mask
    # Rounding must not push "one of three" below a level of 1/3.
    agreed = (staple(drawn) if by == "staple" else drawn.mean(axis=0)) >= level - 1e-6
    if not agreed.any():
        return None
    ratings: dict[str, list[int]] = {}
    for annotation in cluster:
        for name, value in annotation.characteristics.items():
            ratings.setdefault(name, []).append(value)
    box = bounding_box(agreed)
    return Nodule(
        corner=per_axis(int(first + side.start) for first, side in zip(low, box, strict=True)),
        mask=agreed[box],
        readers=len(readers),
        flagged=len(readers) < len(cluster),
        characteristics={name: float(np.median(values)) for name, values in ratings.items()},
        untidy=untidy_contours(cluster),
    )


def staple(masks: np.ndarray) -> np.ndarray:
    """The probability that each voxel is nodule, estimated jointly with each reader's sensitivity and specificity.

    Warfield, Zou & Wells, IEEE Trans. Med. Imaging 23:903-921, 2004, by ITK. The region is the bounding box of all
    readers' marks plus a voxel on each side: a wider one would inflate the specificities, and with them the confidence
    in voxels of a single reader.

    Args:
        masks: bool, (readers, x, y, z), in their common bounding box.

    Returns:
        float, (x, y, z).
    """
    import SimpleITK

    filled = [np.pad(mask, 1).astype(np.uint8) for mask in masks]
    estimate = SimpleITK.STAPLEImageFilter()
    estimate.SetForegroundValue(1)
    estimate.SetMaximumIterations(_STAPLE_ROUNDS)
    probability = estimate.Execute([SimpleITK.GetImageFromArray(mask) for mask in filled])
    return SimpleITK.GetArrayFromImage(probability)[1:-1, 1:-1, 1:-1]


def annotation_mask(annotation: Annotation) -> tuple[np.ndarray, np.ndarray]:
    """One reader's mask of one nodule: the union of the outlined regions, minus the exclusions.

    Returns:
        (corner, mask): the index of the first voxel of a box around all contours, (3,), and the box, bool.
    """
    if annotation.region is not None:
        return np.array(annotation.region.corner), annotation.region.mask
    points = _contour_points(annotation)
    low, high = points.min(axis=0), points.max(axis=0) + 1
    mask = np.zeros(high - low, bool)
    in_plane = mask.shape[:2]
    for contour in annotation.contours:
        if contour.inclusion:
            mask[:, :, contour.slice_index - low[2]] |= contour_mask(contour.points - low[:2], in_plane)
    for contour in annotation.contours:
        if not contour.inclusion:
            edge = contour.points - low[:2]
            cut = contour_mask(edge, in_plane)
            cut[tuple(edge.T)] = True
            mask[:, :, contour.slice_index - low[2]] &= ~cut
    return low, mask


def contour_mask(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside a closed polygon by the even-odd rule, without its listed points.

    A contour that touches or crosses itself, is open, or has gaps is not an error: the last point joins the first.

    Args:
        points: (n, 2) int, column and row.
        shape: columns and rows of the result.

    Returns:
        bool, of `shape`.
    """
    inside = 1  # grid_points_in_poly: 0 outside, 1 inside, 2 vertex, 3 edge
    return grid_points_in_poly(shape, points, binarize=False) == inside


def untidy_contours(cluster: Sequence[Annotation]) -> dict[str, int]:
    """Irregularities in the outlines of one nodule, in words, with counts; all of them are normal in LIDC-IDRI.

    A contour is open if its ends are more than a pixel apart, and has gaps if two consecutive points are. It touches or
    crosses itself if it comes back to a point, or to the middle of a step: so do diagonal steps that cross.

    Args:
        cluster: the annotations of one physical nodule.

    Returns:
        Only those that occur, e.g. `{"open contours": 2}`.
    """
    counts: Counter[str] = Counter()
    for annotation in cluster:
        if annotation.region is not None:  # these contours were not drawn
            continue
        for contour in annotation.contours:
            counts.update(_untidiness(contour.points))
        slices = Counter(contour.slice_index for contour in annotation.contours if contour.inclusion)
        counts["slices with several outlines by one reader"] += sum(n > 1 for n in slices.values())
    drawn = Counter(annotation.reader for annotation in cluster)
    counts["readers who drew it more than once"] = sum(n > 1 for n in drawn.values())
    return {what: count for what, count in counts.items() if count}


def _untidiness(points: np.ndarray) -> list[str]:
    """Irregularities of one contour."""
    corners = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    interior = contour_mask(points - points.min(axis=0), tuple(np.ptp(points, axis=0) + 1))
    found = {"contours with an empty interior": not interior.any()}
    if len(corners) <= 2:
        found["contours of at most two points"] = True
    else:
        doubled = np.concatenate([2 * corners, corners + np.roll(corners, -1, axis=0)])
        found |= {
            "open contours": np.abs(points[0] - points[-1]).max() > 1,
            "contours with gaps over 1 px": np.abs(np.diff(points, axis=0)).max() > 1,
            "contours that touch or cross themselves": len(np.unique(doubled, axis=0)) < len(doubled),
        }
    return [what for what, applies in found.items() if applies]


def _contour_points(annotation: Annotation) -> np.ndarray:
    """(n, 3) int: column, row, slice of every contour point."""
    return np.concatenate(
        [np.insert(contour.points, 2, contour.slice_index, axis=1) for contour in annotation.contours]
    )


def _contour_distances_mm(annotations: Sequence[Annotation], affine: np.ndarray, limit_mm: float) -> np.ndarray:
    """(n, n): the smallest distance between the contour points of two annotations; infinite beyond the limit."""
    trees = [cKDTree(_contour_points(annotation) @ affine[:3, :3].T) for annotation in annotations]
    distances = np.zeros((len(trees), len(trees)))
    for i, tree in enumerate(trees):
        for j in range(i):
            nearest, _ = tree.query(trees[j].data, distance_upper_bound=limit_mm + 2 * _ROUNDING_MM)
            distances[i, j] = distances[j, i] = nearest.min()
    return distances


def _labelled_nodules(labels: np.ndarray) -> list[Nodule]:
    components = cc3d.connected_components(labels == Label.NODULE, connectivity=26)
    boxes = cc3d.statistics(components)["bounding_boxes"]
    return [
        Nodule(per_axis(int(side.start) for side in box), components[box] == number)
        for number, box in enumerate(boxes)
        if number > 0
    ]
