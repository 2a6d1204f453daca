"""Pairs of images and labels, in this project's own folders and in those of nnU-Net and the Decathlon."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lungddpm.core.errors import InputError
from lungddpm.sources.images.files import SUFFIXES, stem_of, suffix_of

CHANNEL = "_0000"
"""nnU-Net's suffix of the first channel, optional with a single channel."""
DATASET = "dataset.json"
OWN, TRAINING, TEST = ("images", "labels"), ("imagesTr", "labelsTr"), ("imagesTs", "labelsTs")
_FOLDERS = (OWN, TRAINING, TEST)
_VOXELS = (".raw", ".zraw")
"""Suffixes of the file next to an .mhd file."""
_NAMES_SHOWN = 3
_SEVERAL_CHANNELS = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Pair:
    """One case, from the names of its files.

    Attributes:
        name: of the case, without suffix and channel.
        image: the CT.
        label: its labels; None if there are none.
        others: images of channels other than the first; includes `image` if the first is missing.
        copies: further labels of the same name.
    """

    name: str
    image: Path
    label: Path | None
    others: tuple[Path, ...] = ()
    copies: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Found:
    """Contents of a data set.

    Attributes:
        pairs: images, with and without labels.
        lonely: labels without an image.
        unlabelled: images of a test set, which have no labels by design.
        unread: files in its folders that are not images by their suffix.
    """

    pairs: tuple[Pair, ...]
    lonely: tuple[Path, ...]
    unlabelled: tuple[Path, ...]
    unread: tuple[Path, ...]


def find_pairs(top: Path) -> Found:
    """Pair the images of a data set with their labels by name.

    Raises:
        InputError: no image was found.
    """
    pairs, lonely, unlabelled, unread = [], [], [], []
    for images, labels in _FOLDERS:
        (image_files, beside), (label_files, others) = _files(top / images), _files(top / labels)
        own_pairs, own_lonely = _pair(image_files, label_files)
        unread += [*beside, *others]
        if (images, labels) == TEST:
            unlabelled = [pair.image for pair in own_pairs if pair.label is None]
            own_pairs = [pair for pair in own_pairs if pair.label is not None]
        pairs += own_pairs
        lonely += own_lonely
    if not pairs and not lonely:
        raise _without_images(top, unlabelled)
    return Found(tuple(pairs), tuple(lonely), tuple(unlabelled), tuple(unread))


def only_unread(files: tuple[Path, ...], folder: str, name: str) -> str:
    """A clause about those of the files not read that are of one case and in one folder; may be empty."""
    beginnings = (f"{name}.", f"{name}{CHANNEL}.")
    own = [file.name for file in files if file.name.startswith(beginnings) and file.parent.name == folder]
    return f", only {', '.join(own)}, which is not read" if own else ""


def describe_unread(top: Path, files: tuple[Path, ...]) -> str:
    """A sentence about the files of a data set that are not read because of their suffix."""
    names = ", ".join(file.relative_to(top).as_posix() for file in files[:_NAMES_SHOWN])
    more = f" and {len(files) - _NAMES_SHOWN} more" if len(files) > _NAMES_SHOWN else ""
    are = "file is" if len(files) == 1 else "files are"
    return f"{len(files)} {are} not read: {names}{more} (read are {', '.join(SUFFIXES)})"


def is_nnunet(top: Path) -> bool:
    """Whether a data set has the folders of nnU-Net and the Decathlon, where dataset.json defines the labels."""
    return any((top / folder).is_dir() for folder, _ in (TRAINING, TEST))


def case_name(file: str) -> str:
    """The name of a case from that of its image, with or without suffix and channel."""
    return stem_of(file).removesuffix(CHANNEL)


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder, and the files that are neither images nor the voxels of one."""
    # Names starting with a dot are system files; macOS leaves ._ files in archives.
    files = sorted(folder.glob("[!.]*"))
    others = [file for file in files if not suffix_of(file.name) and file.suffix.lower() not in _VOXELS]
    return [file for file in files if suffix_of(file.name)], others


def _pair(images: list[Path], labels: list[Path]) -> tuple[list[Pair], list[Path]]:
    labels_of: dict[str, list[Path]] = defaultdict(list)
    for label in labels:
        labels_of[stem_of(label.name)].append(label)
    stems = {stem_of(image.name) for image in images}
    pairs: list[Pair] = []
    others: dict[str, list[Path]] = {}
    for image in images:
        stem = stem_of(image.name)
        parts = _SEVERAL_CHANNELS.fullmatch(stem)
        # Names may end with four digits that are not a channel: if labels have the whole name.
        if stem not in labels_of and parts and f"_{parts[2]}" != CHANNEL:
            first = parts[1] + CHANNEL
            if parts[1] in labels_of or (first in stems and first not in labels_of):
                others.setdefault(parts[1], []).append(image)
                continue
        name = case_name(image.name)
        pairs.append(_pair_of(name, image, labels_of, stem))
    pairs = [replace(pair, others=tuple(others.pop(pair.name, ()))) for pair in pairs]
    pairs += [_pair_of(name, first, labels_of, name, (first, *rest)) for name, (first, *rest) in others.items()]
    paired = {label for pair in pairs for label in (pair.label, *pair.copies)}
    return pairs, [label for label in labels if label not in paired]


def _pair_of(
    name: str, image: Path, labels_of: Mapping[str, list[Path]], stem: str, others: tuple[Path, ...] = ()
) -> Pair:
    """An image with the labels under its stem or under the name of its case."""
    labels = [label for key in dict.fromkeys((stem, name)) for label in labels_of.get(key, ())]
    return Pair(name, image, next(iter(labels), None), others, tuple(labels[1:]))


def _without_images(top: Path, unlabelled: list[Path]) -> InputError:
    if unlabelled:
        problem = f"has {len(unlabelled)} images in {TEST[0]}/, but none with labels"
        return InputError(top.absolute(), problem, f"Add {TRAINING[0]}/ and {TRAINING[1]}/.")
    inside = [
        folder.name for folder in sorted(top.glob("[!.]*")) if any((folder / own[0]).is_dir() for own in _FOLDERS)
    ]
    remedy = "See docs/how-to/run-on-image-files.md for the folders that are read."
    if inside:
        remedy = f"Set source.path to a folder inside it, such as {inside[0]}."
    where = " or ".join(f"{images}/" for images, _ in (OWN, TRAINING))
    return InputError(top.absolute(), f"has no images in {where} ({', '.join(SUFFIXES)})", remedy)
