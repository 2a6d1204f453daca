"""Classical lung segmentation: threshold, removal of airways, separation of left and right, closing over nodules and
hila.

The steps follow Hu, Hoffman & Reinhardt, IEEE Trans. Med. Imaging 20:490-498, 2001 (threshold, separation, closing);
the airways are grown with an explosion stop as in Mori et al., Proc. SPIE 4321, 2001.
"""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.labels import LEFT, RIGHT
from lungddpm.core.volume import AIR_HU, Box, Volume, bounding_box, model_grid, per_axis, resample_image

_WORKING_MM = 1.4
_SPLITTING_MM = 2.8
_SMOOTHING_MM = 1.0
_THRESHOLD_HU = (-550.0, -350.0)
_TISSUE_HU = -300.0
_GAS_HU = -965.0
"""Threshold of the median between emphysema (above) and bowel gas (below)."""
_SHELL_MM = 3.0
"""Erosion that removes the shell of a table but not the patient."""
_CLOSING_MM = 8.0
_COSTAL_CLOSING_MM = 17.0
"""Half the width of the gaps to close: hilar vessels everywhere, nodules of 30 mm on the chest wall."""
_LATERAL_MM = 6.0
"""Tissue lateral to a thinner piece of lung, e.g. next to a bronchus, is not chest wall."""
_TRACHEA_MM2 = (60.0, 700.0)
_LUMEN_HU = -850.0
_TRACHEA_DRIFT_MM = 6.0
_TRACHEA_GAP_MM = 5.0
_TRACHEA_LENGTH_MM = 20.0
_AIRWAY_WALL_MM = 2.0
_MAIN_BRONCHI_MM = 45.0
_LARGEST_AIRWAYS_ML = 130.0
_EXPLOSION_ML = 25.0
_FRAGMENT_LITRES = 0.05
_DEEPEST_PEEL_MM = 30.0
_LUNGS_APART_MM = 40.0
_SMALLER_LUNG_SHARE = 0.1
_CUT_AT_THE_SIDE = "the lungs are cut off at the side of the field of view"
_DEFAULTS = Layouts()


def segment_lungs(ct: Volume, settings: Layouts = _DEFAULTS) -> np.ndarray:
    """Both lungs with their vessels and nodules, without trachea and main bronchi.

    Args:
        ct: HU, RAS+ (see `Volume.canonical`), at any spacing.
        settings: the method and the limits (see `check_lungs`).

    Returns:
        uint8 of the CT's shape: 0 outside, `RIGHT`, `LEFT`.

    Raises:
        ExcludedCaseError: there are no lungs, only one, they are too small, or cut off by the field of view.
        UserError: the method needs a package or weights that are not available.
    """
    if settings.lungs == "classical":
        lungs_lr = _classically(ct)
    else:
        from lungddpm.layouts.networks import lungs_by_network

        lungs_lr = ct.like(lungs_by_network(ct, settings.lungs))
    check_lungs(lungs_lr, settings)
    return _back(lungs_lr, ct)


def _classically(ct: Volume) -> Volume:
    """`RIGHT` and `LEFT` lung on a grid of the CT's extent that may be coarser."""
    work = _at_least(_WORKING_MM, ct)
    spacing = work.spacing_mm
    hu = ndimage.gaussian_filter(work.array, _SMOOTHING_MM / spacing)
    air = hu < _threshold(hu)
    outside = _outside(air, hu, work.voxel_mm3)
    air &= _body(hu, spacing) & ~outside
    lungs = _lung_like(air, hu, work.voxel_mm3)
    airways = _airways(hu, air, lungs, spacing)
    lungs = _lung_like(lungs & ~airways, hu, work.voxel_mm3)
    try:
        lungs_lr = split_lungs(work.like(lungs))
    except ExcludedCaseError:
        if _holds_lung(outside, hu, spacing):
            raise _excluded(_CUT_AT_THE_SIDE) from None
        raise
    return work.like(_close(lungs_lr, airways, spacing))


def split_lungs(lungs: Volume) -> np.ndarray:
    """Separate the right lung from the left where both may touch, by watershed on the distance to the lungs' surface.

    Args:
        lungs: bool, RAS+, both lungs.

    Returns:
        uint8 of the same shape: `RIGHT`, `LEFT`, 0 outside the mask.

    Raises:
        ExcludedCaseError: there are not two lungs side by side.
    """
    if not lungs.array.any():
        raise _excluded("no lungs were found")
    box = bounding_box(lungs.array)
    cropped = lungs.array[box]
    work = _at_least(_SPLITTING_MM, lungs.like(cropped), outside=0.0)
    # An empty rim: the distance to the surface must not extend past the edge of the box.
    mask = np.pad(work.array >= 0.5, 1)
    depth_mm = ndimage.distance_transform_edt(mask, work.spacing_mm)
    markers = _two_lungs(mask, depth_mm, work.spacing_mm)
    coarse = watershed(-depth_mm, markers, mask=mask)
    nearest = ndimage.distance_transform_edt(coarse == 0, work.spacing_mm, return_distances=False, return_indices=True)
    coarse = coarse[tuple(nearest)]
    places = [
        1 + np.minimum((np.arange(n) + 0.5) * (m - 2) / n, m - 3).astype(int)
        for n, m in zip(cropped.shape, mask.shape, strict=True)
    ]
    lungs_lr = np.zeros(lungs.shape, np.uint8)
    lungs_lr[box] = np.where(cropped, coarse[np.ix_(*places)], 0)
    return lungs_lr


def measure_lungs(lungs_lr: Volume) -> dict[str, float]:
    """Quality figures of the lungs.

    Args:
        lungs_lr: `RIGHT` and `LEFT`, RAS+, with at least one voxel.

    Returns:
        `lung_litres_right`, `lung_litres_left`; `smaller_lung_share` of both lungs' volume; `end_slice_share_bottom`
        and `end_slice_share_top`, the lungs' area on the scan's end slices as a share of their greatest axial area.
    """
    right, left = (np.count_nonzero(lungs_lr.array == side, axis=(0, 1)) for side in (RIGHT, LEFT))
    areas = right + left
    litre = lungs_lr.voxel_mm3 / 1e6
    return {
        "lung_litres_right": float(right.sum() * litre),
        "lung_litres_left": float(left.sum() * litre),
        "smaller_lung_share": float(min(right.sum(), left.sum()) / areas.sum()),
        "end_slice_share_bottom": float(areas[0] / areas.max()),
        "end_slice_share_top": float(areas[-1] / areas.max()),
    }


def check_lungs(lungs_lr: Volume, settings: Layouts) -> None:
    """Check that the scan covers both lungs completely, and that their volumes are plausible.

    Args:
        lungs_lr: see `measure_lungs`.
        settings: the limits.

    Raises:
        ExcludedCaseError: there are not two lungs, an end slice or a side of the scan cuts through them, they are too
            small or too large, or one is too small.
    """
    found = [side for side in (RIGHT, LEFT) if (lungs_lr.array == side).any()]
    if len(found) < 2:
        raise _excluded("only one lung was found" if found else "no lungs were found")
    figures, limits = measure_lungs(lungs_lr), settings.limits
    for end in ("bottom", "top"):
        if (share := figures[f"end_slice_share_{end}"]) > limits.end_slice_share:
            raise _excluded(
                f"the lungs are cut off at the {end} of the scan: its end slice has {share:.1%} of their largest"
                f" area, more than {limits.end_slice_share:.1%} (layouts.limits.end_slice_share)"
            )
    for axis in (0, 1):
        areas = np.count_nonzero(lungs_lr.array, axis=(1 - axis, 2))
        if max(areas[0], areas[-1]) > limits.end_slice_share * areas.max():
            raise _excluded(_CUT_AT_THE_SIDE)
    litres = figures["lung_litres_right"] + figures["lung_litres_left"]
    least, most = limits.lung_litres
    if not least <= litres <= most:
        raise _excluded(
            f"the lung volume is {litres:.2f} litres, outside {least:g} to {most:g} (layouts.limits.lung_litres)"
        )
    if (share := figures["smaller_lung_share"]) < limits.smaller_lung_share:
        raise _excluded(
            f"the smaller lung has {share:.1%} of the lung volume, less than {limits.smaller_lung_share:.1%}"
            " (layouts.limits.smaller_lung_share)"
        )


def pieces_holding(seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The 6-connected components of a mask that contain a seed; both bool, of equal shape, the seeds within the
    mask."""
    labels, count = cc3d.connected_components(mask, connectivity=6, return_N=True)
    kept = np.zeros(count + 1, bool)
    kept[labels[seeds]] = True
    return kept[labels]


def _excluded(problem: str) -> ExcludedCaseError:
    return ExcludedCaseError("CT", problem, "Use chest CT in Hounsfield units that covers both lungs.")


def _at_least(spacing_mm: float, volume: Volume, outside: float = AIR_HU) -> Volume:
    """The volume on a grid no finer than `spacing_mm` along any axis; unchanged if it already is."""
    shape = per_axis(
        int(np.ceil(n * s / spacing_mm)) if s < spacing_mm else n
        for n, s in zip(volume.shape, volume.spacing_mm, strict=True)
    )
    if shape == volume.shape:
        return volume.like(volume.array.astype(np.float32))
    return resample_image(volume, model_grid(volume, shape), shape, outside)


def _threshold(hu: np.ndarray) -> float:
    """Midway between the means of lung and of soft tissue, iterated to a fixed point (Hu et al. 2001, section II-A)."""
    values = hu[(hu > _GAS_HU) & (hu < 200)][::5]
    threshold = float(np.mean(_THRESHOLD_HU))
    for _ in range(20):
        lung, tissue = values[values < threshold], values[values >= threshold]
        if not lung.size or not tissue.size:
            break
        threshold = float((lung.mean() + tissue.mean()) / 2)
    return float(np.clip(threshold, *_THRESHOLD_HU))


def _outside(air: np.ndarray, hu: np.ndarray, voxel_mm3: float) -> np.ndarray:
    """The air around the patient, i.e. air that touches a lateral face.

    Raises:
        ExcludedCaseError: lung touches a lateral face.
    """
    labels = cc3d.connected_components(air, connectivity=6)
    lateral = _present((labels[0], labels[-1], labels[:, 0], labels[:, -1]), labels.max())
    if _lung_like((lateral & ~_whole_length(labels))[labels], hu, voxel_mm3).any():
        raise _excluded(_CUT_AT_THE_SIDE)
    return lateral[labels]


def _holds_lung(outside: np.ndarray, hu: np.ndarray, spacing: np.ndarray) -> bool:
    """Whether the air around the patient includes lung, e.g. if the scanner's circle cuts through the chest."""
    dense = (outside & (hu > _GAS_HU)).view(np.uint8)
    # Thin layers, as at the patient's skin, are between air and tissue only because of partial volume.
    dense = ndimage.minimum_filter(dense, 2 * np.maximum(1, np.rint(_SHELL_MM / spacing)).astype(int) + 1)
    labels = cc3d.connected_components(dense, connectivity=6)
    return bool(_lung_like(dense.astype(bool) & ~_whole_length(labels)[labels], hu, float(spacing.prod())).any())


def _whole_length(labels: np.ndarray) -> np.ndarray:
    """For each label whether it extends over the whole scan, like a table whose foam looks like lung."""
    return _present((labels[:, :, 0],), labels.max()) & _present((labels[:, :, -1],), labels.max())


def _present(faces: tuple[np.ndarray, ...], largest: int) -> np.ndarray:
    """For each label up to the largest whether it occurs in a face; never for 0."""
    present = np.zeros(largest + 1, bool)
    for face in faces:
        present[np.unique(face)] = True
    present[0] = False
    return present


def _body(hu: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The patient including all cavities, without the table, whose shell is too thin to survive an erosion."""
    reach = np.maximum(1, np.rint(_SHELL_MM / spacing)).astype(int)
    # A chest wall cut by the field of view continues beyond it: the remaining part must not count as a shell.
    beyond = [(2 * n + 2, 2 * n + 2) for n in reach[:2]]
    tissue = np.pad(hu > _TISSUE_HU, [*beyond, (0, 0)], mode="edge")
    solid = ndimage.minimum_filter(tissue.view(np.uint8), 2 * reach + 1)
    core = cc3d.largest_k(solid, k=1, connectivity=6).astype(np.uint8)
    body = ndimage.maximum_filter(core, 2 * (reach + 1) + 1).astype(bool)
    for k in range(body.shape[2]):
        body[:, :, k] = ndimage.binary_fill_holes(body[:, :, k])
    (x, _), (y, _) = beyond
    return body[x:-x, y:-y]


def _lung_like(air: np.ndarray, hu: np.ndarray, voxel_mm3: float) -> np.ndarray:
    """The large components of air that are denser than gas, which leaves out bowel and stomach."""
    labels = cc3d.connected_components(air, connectivity=6)
    statistics = cc3d.statistics(labels)
    keep = np.zeros(labels.max() + 1, bool)
    for label in range(1, len(keep)):
        if statistics["voxel_counts"][label] * voxel_mm3 / 1e6 >= _FRAGMENT_LITRES:
            box = statistics["bounding_boxes"][label]
            keep[label] = np.median(hu[box][labels[box] == label]) > _GAS_HU
    return keep[labels]


def _airways(hu: np.ndarray, air: np.ndarray, lungs: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Trachea and main bronchi with their walls, as far as they are air; empty if no trachea is visible.

    The threshold rises from step to step until the region explodes into the lungs (Mori et al. 2001).
    """
    trachea = _trachea(hu, air, lungs, spacing)
    if not trachea.any():
        return trachea
    millilitre = 1000 / spacing.prod()
    tree, most = trachea, _LARGEST_AIRWAYS_ML * millilitre
    for limit in range(-950, -600, 25):
        grown = pieces_holding(trachea, ((hu < limit) & air) | trachea)
        size = np.count_nonzero(grown)
        if size > most:
            break
        tree, most = grown, min(size + _EXPLOSION_ML * millilitre, _LARGEST_AIRWAYS_ML * millilitre)
    carina_z = np.flatnonzero(trachea.any(axis=(0, 1)))[0]
    carina = [*np.argwhere(trachea[:, :, carina_z]).mean(axis=0), carina_z]
    x, y, z = np.ogrid[tuple(slice(n) for n in tree.shape)]
    offsets = [(axis - centre) * step for axis, centre, step in zip((x, y, z), carina, spacing, strict=True)]
    main = trachea | (tree & (offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2 <= _MAIN_BRONCHI_MM**2))
    box = _widened(bounding_box(main), np.ceil(_AIRWAY_WALL_MM / spacing).astype(int))
    walled = np.zeros_like(main)
    walled[box] = (ndimage.distance_transform_edt(~main[box], spacing) <= _AIRWAY_WALL_MM) & air[box]
    return walled


def _trachea(hu: np.ndarray, air: np.ndarray, lungs: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The longest vertical chain of round patches of air near the midline, from the top down to the carina."""
    trachea = np.zeros_like(air)
    if not lungs.any():
        return trachea
    side, _, height = bounding_box(lungs)
    gap = max(1, round(_TRACHEA_GAP_MM / spacing[2]))
    centre, reach = (side.start + side.stop) / 2, (side.stop - side.start) / 5
    chains: list[list[tuple[int, np.ndarray, np.ndarray]]] = []
    for k in range(air.shape[2] - 1, (height.start + height.stop) // 2, -1):
        for patch in _round_patches(air[:, :, k] & (hu[:, :, k] < _LUMEN_HU), spacing):
            middle = patch.mean(axis=0)
            if abs(middle[0] - centre) > reach:
                continue
            for chain in chains:
                above, before, _ = chain[-1]
                if (
                    above - k <= gap
                    and above > k
                    and np.linalg.norm((middle - before) * spacing[:2]) < _TRACHEA_DRIFT_MM
                ):
                    chain.append((k, middle, patch))
                    break
            else:
                chains.append([(k, middle, patch)])
    longest = max(chains, key=len, default=[])
    if len(longest) * spacing[2] >= _TRACHEA_LENGTH_MM:
        for k, _, patch in longest:
            trachea[patch[:, 0], patch[:, 1], k] = True
    return trachea


def _round_patches(air: np.ndarray, spacing: np.ndarray) -> list[np.ndarray]:
    """Patches of air in an axial slice that could be the trachea's lumen, each as (n, 2) pixel indices."""
    labels, _ = ndimage.label(air)
    patches = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        patch = labels[box] == label
        width, depth = np.array(patch.shape) * spacing[:2]
        area = np.count_nonzero(patch) * spacing[0] * spacing[1]
        round_enough = max(width, depth) < 2.5 * min(width, depth) and area > 0.5 * width * depth
        if _TRACHEA_MM2[0] <= area <= _TRACHEA_MM2[1] and round_enough:
            patches.append(np.argwhere(patch) + np.array([box[0].start, box[1].start]))
    return patches


def _two_lungs(mask: np.ndarray, depth_mm: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Cores of the two lungs (values `RIGHT` and `LEFT`), found by eroding until there are two large pieces side by
    side."""
    for peeled_mm in np.arange(0, _DEEPEST_PEEL_MM, spacing.min()):
        labels = cc3d.connected_components(depth_mm > peeled_mm, connectivity=6)
        counts = cc3d.statistics(labels)["voxel_counts"][1:]
        if len(counts) < 2:
            continue
        larger, smaller = np.argsort(counts)[::-1][:2] + 1
        of_larger, of_smaller = (
            np.flatnonzero((labels == label).any(axis=(1, 2))).mean() for label in (larger, smaller)
        )
        is_apart = abs(of_larger - of_smaller) * spacing[0] > _LUNGS_APART_MM
        if is_apart and counts[smaller - 1] >= _SMALLER_LUNG_SHARE * counts[larger - 1]:
            right, left = (larger, smaller) if of_larger > of_smaller else (smaller, larger)
            return np.where(labels == right, RIGHT, np.where(labels == left, LEFT, 0)).astype(np.int32)
    raise _excluded("only one lung was found")


def _close(lungs_lr: np.ndarray, airways: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Each lung closed over vessels, hila and nodules on the pleura, with holes filled, without the airways.

    A wider closing, for large nodules on the chest wall, is only used where the same lung is further medial: at the
    mediastinum it would include the aorta.
    """
    margin = np.ceil(_COSTAL_CLOSING_MM / spacing).astype(int) + 2
    # Padding on every side: at the edge of the array, the dilation would not be eroded again.
    lungs_lr, airways = (np.pad(array, [(n, n) for n in margin]) for array in (lungs_lr, airways))
    all_closed = lungs_lr.copy()
    for side in (RIGHT, LEFT):
        box = _widened(bounding_box(lungs_lr == side), margin)
        lung = lungs_lr[box] == side
        from_medial = slice(None, None, 1 if side == RIGHT else -1)
        beyond_lung = np.logical_or.accumulate(lung[from_medial], axis=0)[from_medial]
        thickness = (1, *np.maximum(1, np.rint(_LATERAL_MM / spacing[1:])).astype(int))
        beyond_lung = ndimage.grey_opening(beyond_lung.view(np.uint8), thickness).astype(bool)
        distance_mm = ndimage.distance_transform_edt(~lung, spacing)
        closed = lung.copy()
        for radius_mm, where in ((_CLOSING_MM, True), (_COSTAL_CLOSING_MM, beyond_lung)):
            near = distance_mm <= radius_mm
            closed.flat[_amid(near, np.flatnonzero(near & ~lung & where), radius_mm, spacing)] = True
        closed = ndimage.binary_fill_holes(closed) & ~airways[box] & (all_closed[box] == 0)
        all_closed[box][closed] = side
    return all_closed[tuple(slice(n, -n) for n in margin)]


def _amid(mask: np.ndarray, places: np.ndarray, radius_mm: float, spacing: np.ndarray) -> np.ndarray:
    """The voxels (flat indices) whose neighbourhood within a radius is entirely in the mask; voxels outside
    the array are not.

    Equals a distance transform of the mask above the radius, but several times as fast for few voxels: of the lines of
    the ball, most voxels fail after a few.
    """
    reach = np.floor(radius_mm / spacing).astype(int)
    x, y, z = (step * np.arange(-n, n + 1) for step, n in zip(spacing, reach, strict=True))
    inside = np.sqrt(x[:, None, None] ** 2 + y[:, None] ** 2 + z**2) <= radius_mm
    half = (np.count_nonzero(inside, axis=0) - 1) // 2
    lines = np.argwhere(inside.any(axis=0)) - reach[1:]
    # Along x: distance to the next voxel outside the mask.
    numbers = np.arange(mask.shape[0], dtype=np.int16)[:, None, None]
    before = np.maximum.accumulate(np.where(mask, np.int16(-1), numbers), axis=0)
    after = np.minimum.accumulate(np.where(mask, np.int16(len(numbers)), numbers)[::-1], axis=0)[::-1]
    margin = (0, *reach[1:])
    run = np.pad(np.minimum(numbers - before, after - numbers), [(n, n) for n in margin])
    x, y, z = (part + n for part, n in zip(np.unravel_index(places, mask.shape), margin, strict=True))
    at = np.ravel_multi_index((x, y, z), run.shape)
    # The farthest lines first, because they exclude most.
    for j, k in lines[np.argsort(-np.abs(lines * spacing[1:]).max(axis=1), kind="stable")]:
        kept = run.flat[at + (j * run.shape[2] + k)] > half[j + reach[1], k + reach[2]]
        at, places = at[kept], places[kept]
    return places


def _widened(box: Box, margin: np.ndarray) -> Box:
    return per_axis(slice(max(0, edge.start - n), edge.stop + n) for edge, n in zip(box, margin, strict=True))


def _back(lungs_lr: Volume, ct: Volume) -> np.ndarray:
    """The lungs on the CT's own grid, which has the same extent."""
    if lungs_lr.shape == ct.shape:
        return lungs_lr.array
    result = np.zeros(ct.shape, np.uint8)
    for side in (RIGHT, LEFT):
        mask = lungs_lr.array == side
        box = per_axis(
            slice(int(edge.start * n / m), int(np.ceil(edge.stop * n / m)))
            for edge, n, m in zip(bounding_box(mask), ct.shape, lungs_lr.shape, strict=True)
        )
        target = ct.crop(box)
        lung = resample_image(lungs_lr.like(mask), target.affine, target.shape, outside=0.0).array
        result[box][lung >= 0.5] = side
    return result
