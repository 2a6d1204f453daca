"""Training data of the denoiser: cases decoded once into a cache on disk, and the samples of each step.

Sample i of a training (its case, crop, noise level, augmentation and noise) is a function of the seed and of i alone.
So the order of samples does not depend on the number of processes, and a resumed training does not need the state of
random generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from lungddpm.config.sections import GeneratorConfig, Size3, TrainedSettings
from lungddpm.core import cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import atomic_path, exclusive_lock, fingerprint, seed_from
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.volume import Box, per_axis, to_model_range
from lungddpm.models.accelerator import send
from lungddpm.models.augmentation import augment, draw_augmentation
from lungddpm.models.denoiser import condition_channels
from lungddpm.models.hints import show
from lungddpm.models.recipe import Batch, Objective, Recipe

_CACHE_FORMAT = "z y x, int16 HU, uint8 labels"
_ALL_HU = np.arange(-(2**15), 2**15, dtype=np.int16)


@dataclass(frozen=True)
class TrainingData:
    """All cases as arrays that may be on disk.

    Attributes:
        case_ids: n names.
        ct: (n, D, H, W) int16 HU.
        layout: (n, D, H, W) uint8 labels.
    """

    case_ids: Sequence[str]
    ct: np.ndarray
    layout: np.ndarray


def open_cache(
    folder: Path,
    case_ids: Sequence[str],
    case_folders: Sequence[cases.CaseFolder],
    hashes: Sequence[str],
    size: Size3,
) -> TrainingData:
    """All cases as memory-mapped arrays, decoded on the first call; later calls read only what they use.

    The two files hold 3 bytes per voxel (5 GB for 800 cases of 128^3) and are named after their content; those of other
    cohorts are removed. Several processes may call this at once: one decodes, the others wait for it.

    Args:
        folder: for the cache and nothing else.
        case_ids: name of each case.
        case_folders: folder of each case.
        hashes: `cases.hash_case` of each of them.
        size: voxels along x, y, z that all cases must have.

    Raises:
        InputError: a case is unreadable, breaks its contract, or is on another grid.
    """
    name = fingerprint([_CACHE_FORMAT, *hashes])[:32]
    shape = (len(hashes), *reversed(size))
    paths = {kind: folder / f"{name}-{kind}.npy" for kind in ("ct", "layout")}
    with exclusive_lock(folder / ".lock", f"decoding cases into {folder}"):
        for other in folder.iterdir():
            if other not in paths.values() and other.name != ".lock":
                other.unlink()
        arrays = _open_arrays(paths, shape)
        if arrays is None:
            _decode(paths, shape, case_folders)
            arrays = _mapped(paths)
    return TrainingData(case_ids, arrays["ct"], arrays["layout"])


class SampleStream:
    """The samples of a training, by number.

    Args:
        data: the cases.
        config: of the generator.
        recipe: how it is trained.
        objective: that of the recipe.
        device: where the tensors go. Voxels are computed there; crop, noise level and
            augmentation are drawn on the CPU.
    """

    def __init__(
        self,
        data: TrainingData,
        config: GeneratorConfig[TrainedSettings],
        recipe: Recipe,
        objective: Objective,
        device: torch.device,
    ):
        self.data, self.device = data, device
        self.training, self.draw_level = config.settings.training, objective.draw_level
        self.seed, self.run = config.seed, config.run
        self.centres, self.one_nodule, self.hint = recipe.crop_centres, recipe.one_nodule, recipe.hint
        # Lookup tables on the device: `to_model_range` of every HU, `condition_channels` of every label.
        labels = np.arange(len(Label), dtype=np.uint8).reshape(-1, 1, 1)
        channels = condition_channels(labels, config.settings.classes).reshape(-1, len(Label))
        self.range_of_hu = torch.from_numpy(to_model_range(_ALL_HU, config.grid.window_hu)).to(device)
        self.channels_of_label = torch.from_numpy(channels).to(device)

    def batch(self, number: int) -> Batch:
        """The samples of one forward pass, counted over the steps, accumulation and processes of the training."""
        size = self.training.batch_size
        samples = [self._sample(number * size + place) for place in range(size)]
        return Batch(*(torch.stack(parts) for parts in zip(*samples, strict=True)))

    def _sample(self, index: int) -> tuple[torch.Tensor, ...]:
        """The content of `Batch`, without N."""
        case = self._case(index)
        ct, layout = self.data.ct[case], self.data.layout[case]
        generator = torch.Generator().manual_seed(seed_from(self.seed, self.run, "sample", index))
        crop = per_axis(slice(0, size) for size in layout.shape)
        if self.training.crop is not None:
            crop, centre = draw_crop(layout, self.training.crop, self.centres, generator)
            layout = only_nodule(layout, centre) if self.one_nodule else layout
        level = self.draw_level(generator)
        change = draw_augmentation(self.training.augmentation, generator)
        is_turned = change is not None and change.affine is not None
        # An affine map reads beyond the crop, and so does the hint `slice`.
        reads_all = is_turned or self.hint == "slice"
        read = ... if reads_all else crop
        hu, labels = (send(torch.from_numpy(array[read].copy()), self.device) for array in (ct, layout))
        clean = self.range_of_hu[hu.int() - int(_ALL_HU[0])][None]
        # Before any interpolation, which would leak voxels that are to be drawn into the hint.
        images = torch.cat([clean, show(self.hint, clean[None], self._channels(labels)[None])[0]])
        if reads_all and not is_turned:
            images, labels = images[:, *crop], labels[crop]
        if change is not None:
            images, labels = augment(images, labels, change, crop)
        generator = torch.Generator(self.device).manual_seed(seed_from(self.seed, self.run, "noise", index))
        clean, shown, condition = images[:1], images[1:], self._channels(labels)
        if self.hint == "volume":  # gain and offset changed the mask, too
            shown = show(self.hint, shown[None], condition[None])[0]
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        return clean, condition, noise, send(level, self.device), shown

    def _channels(self, labels: torch.Tensor) -> torch.Tensor:
        """`condition_channels` of labels on the device: (D, H, W) -> (C, D, H, W)."""
        return self.channels_of_label[:, labels.long()]

    def _case(self, index: int) -> int:
        """Every case once, in random order, before any is repeated."""
        epoch, place = divmod(index, len(self.data.ct))
        generator = torch.Generator().manual_seed(seed_from(self.seed, self.run, "order", epoch))
        return int(torch.randperm(len(self.data.ct), generator=generator)[place])


def draw_crop(
    layout: np.ndarray, edge: int, centres: Sequence[Label], generator: torch.Generator
) -> tuple[Box, tuple[int, ...]]:
    """A random cube around something to generate; open voxels are pasted later, so they matter less.

    A label is drawn from those in the layout (so that the few nodule voxels are seen as often as lung), then one of
    its voxels as the centre; the cube is moved to lie inside the volume.

    Args:
        layout: labels, axes in any order.
        edge: voxels along each side, at most those of the layout.
        centres: labels that the centre may have; any voxel if the layout has none of them.
        generator: source of the draws.

    Returns:
        The cube, and the voxel that it was drawn around.
    """
    labels = [label for label in centres if (layout == label).any()]
    if labels:
        chosen = np.flatnonzero(layout == labels[_integer(len(labels), generator)])
        centre = [int(place) for place in np.unravel_index(chosen[_integer(len(chosen), generator)], layout.shape)]
    else:
        centre = [_integer(size, generator) for size in layout.shape]
    starts = (min(max(c - edge // 2, 0), size - edge) for c, size in zip(centre, layout.shape, strict=True))
    return per_axis(slice(start, start + edge) for start in starts), tuple(centre)


def only_nodule(layout: np.ndarray, voxel: tuple[int, ...]) -> np.ndarray:
    """The layout with only the nodule that this voxel is part of; others become lung. Unchanged if it is in none.

    Nodules are separated as in drawing: by all 26 neighbours.
    """
    if layout[voxel] != Label.NODULE:
        return layout
    numbers, count = ndimage.label(layout == Label.NODULE, np.ones((3, 3, 3)))
    if count == 1:
        return layout
    return np.where((numbers > 0) & (numbers != numbers[voxel]), np.uint8(Label.LUNG), layout)


def _open_arrays(paths: dict[str, Path], shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """The arrays on disk; None if one is missing or incomplete."""
    if not all(path.exists() for path in paths.values()):
        return None
    try:
        arrays = _mapped(paths)
    except Exception:  # on damaged bytes, numpy raises many kinds of errors
        LOG.warning("The cache %s is damaged and is made again", paths["ct"].parent)
        return None
    return arrays if all(array.shape == shape for array in arrays.values()) else None


def _mapped(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    return {kind: np.load(path, mmap_mode="r") for kind, path in paths.items()}


def _decode(paths: dict[str, Path], shape: tuple[int, ...], case_folders: Sequence[cases.CaseFolder]) -> None:
    with (
        atomic_path(paths["ct"]) as ct_path,
        atomic_path(paths["layout"]) as layout_path,
        # Plain writes: on a full disk, writing to mapped memory would kill the process instead of raising.
        ct_path.open("wb") as ct_file,
        layout_path.open("wb") as layout_file,
        Progress("decoding cases", len(case_folders)) as progress,
    ):
        for file, descr in ((ct_file, "<i2"), (layout_file, "|u1")):
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        for number in progress.steps():
            ct, layout = case_folders[number].read()
            if ct.shape != shape[:0:-1]:
                problem = f"has {ct.shape} voxels, but grid.size is {shape[:0:-1]}"
                raise InputError(case_folders[number].path, problem, "Prepare the cases again (lungddpm prepare).")
            ct_file.write(ct.array.astype("<i2").transpose(2, 1, 0).tobytes())
            layout_file.write(layout.array.astype(np.uint8).transpose(2, 1, 0).tobytes())


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))
