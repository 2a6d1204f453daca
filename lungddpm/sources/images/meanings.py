"""Meaning of label numbers: from the settings, from names in dataset.json, or this project's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import read_json
from lungddpm.core.labels import Label
from lungddpm.sources.images.folders import DATASET, is_nnunet
from lungddpm.sources.images.settings import Images

UNDERSTOOD: dict[Label, tuple[str, ...]] = {
    Label.BACKGROUND: ("background",),
    Label.LUNG: ("lung", "lungs", "left lung", "right lung"),
    Label.NODULE: ("nodule", "nodules", "tumour", "tumours", "tumor", "tumors", "cancer", "lesion", "lesions"),
    Label.VESSEL: ("vessel", "vessels"),
}
"""Names in dataset.json that do not need a setting; capitals, `_` and `-` are ignored, and so is a first word that says
that nodules or vessels are those of the lungs."""
_OF_LUNGS = ("lung ", "pulmonary ")
_KEY = "source.images.labels"
_EXAMPLE = f"Define them, e.g. {_KEY}: {{1: nodule}}."


def meanings_of(top: Path, settings: Images) -> dict[int, Label]:
    """The meaning of each label number of a data set.

    Raises:
        InputError: dataset.json is needed but missing, or invalid, or names an undefined label.
        ConfigError: the settings name a label that dataset.json does not have, or 0 as something else than background.
    """
    if not (top / DATASET).is_file():
        return _without_names(top, settings)
    named, regions = _names(top / DATASET, bool(settings.labels))
    meanings = {Label.BACKGROUND.value: Label.BACKGROUND}
    meanings |= {number: label for number, name in named.items() if (label := _understood(name)) is not None}
    meanings |= _given(settings, named, regions)
    if left := {number: name for number, name in named.items() if number not in meanings}:
        shown = ", ".join(f"{number} '{name}'" for number, name in left.items())
        number, name = next(iter(left.items()))
        example = f"{{{number}: {'nodule' if _may_be_nodule(name) else 'background'}}}"
        raise InputError(
            (top / DATASET).absolute(),
            f"names unknown labels ({shown})",
            f"Define them in {_KEY}, e.g. {example}; available: background, lung, nodule, vessel.",
        )
    return meanings


def _understood(name: str) -> Label | None:
    understood = {known: label for label, names in UNDERSTOOD.items() for known in names}
    plain = _plain(name)
    of_lungs = next((understood.get(plain[len(first) :]) for first in _OF_LUNGS if plain.startswith(first)), None)
    return understood.get(plain, of_lungs if of_lungs in (Label.NODULE, Label.VESSEL) else None)


def _may_be_nodule(name: str) -> bool:
    return any(word in _plain(name) for word in (*UNDERSTOOD[Label.NODULE], "gtv"))


def translate(stored: np.ndarray, meanings: dict[int, Label], origin: Path) -> np.ndarray:
    """Labels of a file as those of a layout.

    Args:
        stored: whole numbers as uint8; anything else is an error.
        meanings: see `meanings_of`.
        origin: the file, for the message.

    Returns:
        uint8 `Label`.

    Raises:
        InputError: an undefined value.
    """
    found = np.unique(stored)
    if unknown := [value for value in found if value not in meanings]:
        known = ", ".join(f"{number} {label.name.lower()}" for number, label in sorted(meanings.items()))
        raise InputError(
            origin,
            f"the labels contain {', '.join(f'{value:g}' for value in unknown[:5])}, allowed are {known}",
            f"Correct the file, or define the label in {_KEY}.",
        )
    table = np.zeros(np.iinfo(np.uint8).max + 1, np.uint8)
    table[list(meanings)] = list(meanings.values())
    return table[stored.astype(np.uint8)]


def _without_names(top: Path, settings: Images) -> dict[int, Label]:
    if settings.labels:
        return {Label.BACKGROUND.value: Label.BACKGROUND, **_given(settings, None, [])}
    if is_nnunet(top):
        raise InputError(top.absolute(), f"has no {DATASET} to define the labels", _EXAMPLE)
    return {label.value: label for label in Label}


def _given(settings: Images, named: dict[int, str] | None, regions: list[tuple[int, str]]) -> dict[int, Label]:
    """The settings by number; `named` and `regions`: see `_names`, None without dataset.json."""
    given = {_number(key, named, regions): Label[meaning.upper()] for key, meaning in settings.labels.items()}
    first = given.get(0, Label.BACKGROUND)
    if first != Label.BACKGROUND:
        raise ConfigError(_KEY, f"makes 0 {first.name.lower()}, but 0 is background", "Use the label's own number.")
    return given


def _names(path: Path, can_do_without: bool) -> tuple[dict[int, str], list[tuple[int, str]]]:
    """Names by number, and the numbers and names of regions: nnU-Net writes {"tumour": 1} or, for a region,
    {"tumour": [1, 2]}, the Decathlon {"1": "cancer"}."""
    labels = read_json(path.absolute(), f"Copy it again, or remove it and set {_KEY}.").get("labels")
    if not isinstance(labels, dict) or not labels:
        if can_do_without:
            return {}, []
        raise InputError(path.absolute(), "has no labels", _EXAMPLE)
    names: dict[int, str] = {}
    regions: list[tuple[int, str]] = []
    for key, value in labels.items():
        if isinstance(value, list) and can_do_without:
            regions += [(number, key) for number in value if _is_number(number)]
            continue
        number, name = (int(key), value) if key.isdecimal() else (value, key)
        if not _is_number(number) or not isinstance(name, str) or number in names:
            problem = f"has a label that is not one number and one name ('{key}': {value!r:.60})"
            raise InputError(path.absolute(), problem, f'Write {{"tumour": 1}} or {{"1": "tumour"}}, or set {_KEY}.')
        names[number] = name
    return names, regions


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= np.iinfo(np.uint8).max


def _number(key: str, named: dict[int, str] | None, regions: list[tuple[int, str]]) -> int:
    """The number for a key of the settings."""
    known = [*(named or {}).items(), *regions]
    shown = ", ".join(f"{number} {name}" for number, name in known) or "no names"
    if key.isdecimal():
        if known and int(key) not in dict(known):
            raise ConfigError(_KEY, f"has the number {key}, which is not in {DATASET}", f"It has {shown}.")
        return int(key)
    if named is None:
        raise ConfigError(_KEY, f"has the name '{key}', but there is no {DATASET}", "Use the label's number.")
    numbers = [number for number, name in named.items() if _plain(name) == _plain(key)]
    if not numbers:
        raise ConfigError(_KEY, f"has the name '{key}', which is not in {DATASET}", f"It has {shown}.")
    return numbers[0]


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
