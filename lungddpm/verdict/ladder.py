"""The ladder: how much of the CT to draw a generator is given, crossed with the family of its model.

In the published table both change together: each method is from a different family and is given a different part of the
target, and only Lung-DDPM gets the whole volume around the lungs. A run that fills several cells of a row or column
separates the two effects. The cell of a generator follows from its settings (`generators.given_of`), so a config cannot
contradict it; two cells of a family are two variants of one generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lungddpm import generators
from lungddpm.config.models import Config
from lungddpm.core.arms import Arm
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.generators import GIVEN, NOTHING, VOLUME, given_of
from lungddpm.quality.image_quality import LUNGS, SYNTHETIC, WHOLE
from lungddpm.verdict.published import WITHOUT_LAYOUT

LADDER_COLUMNS = [
    "family", "given", "generator", "stands_for", "fid", "fid_lungs", "fidelity_dice", "fidelity_difference",
    "arm", "difference", "ci_low", "ci_high", "verdict", "note",
]  # fmt: skip
NOT_IN_RUN = "not in this run"
_UNCONDITIONAL = "unconditional GAN"


def cell_of(config: Config, generator: str) -> tuple[str, str] | None:
    """Family and given information of a generator in the config; None if it has no cell: controls, floors, and samples
    of other systems."""
    if generator in config.arms.external or (family := config.plugin_of(generator).family) is None:
        return None
    return family, given_of(config.for_generator(generator))


def stands_for(config: Config, generator: str) -> str:
    """The published method that a generator represents, as configured; empty if there is none.

    None of them has a wavelet network. Those that are given the volume paste it around what they draw; their network
    sees none of it.
    """
    cell = cell_of(config, generator)
    if cell is None:
        return ""
    shown = getattr(_settings_of_network(config, generator), "hint", "none") != "none"
    if (cell[1] == VOLUME and shown) or has_wavelets(config, generator):
        return ""
    return config.plugin_of(generator).published_as.get(cell[1], "")


def has_wavelets(config: Config, generator: str) -> bool:
    """Whether a generator of the config draws with a network that works on wavelets (`denoiser.wavelet`)."""
    return bool(getattr(getattr(_settings_of_network(config, generator), "denoiser", None), "wavelet", False))


def _settings_of_network(config: Config, generator: str) -> Any:
    """The settings of the generator whose network draws; of one without a network, its own."""
    of_generator = config.for_generator(generator)
    return (of_generator.weights_from or of_generator).settings


def published_generators(config: Config) -> dict[str, str]:
    """Published methods -> the generator in use that represents each, the first one if there are several."""
    found: dict[str, str] = {}
    for name in config.arms.largest_doses():
        if method := stands_for(config, name):
            found.setdefault(method, name)
    return found


def ladder_table(
    config: Config,
    verdict: pd.DataFrame,
    image_quality: pd.DataFrame | None = None,
    fidelity: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The cells of a run, and those of published methods that are missing from it.

    Args:
        config: of the run.
        verdict: rows of `verdict.csv`.
        image_quality: rows of `image_quality.csv`, if measured.
        fidelity: rows of `label_fidelity.csv`, if measured.

    Returns:
        `LADDER_COLUMNS`, one row per generator in use that is in a cell, ordered by family and given information:
        image quality (FID of whole volumes and of the lungs), label fidelity (Dice, and its difference from the
        ceiling) and the difference between the arm of its largest dose (with the most real cases) and these real cases
        alone. Published methods that no generator in use represents follow, with an empty `generator`.
    """
    deciding = verdict[verdict["metric"] == deciding_measure().column].set_index("arm")
    rows: list[dict[str, Any]] = []
    for name in config.arms.largest_doses():
        if (cell := cell_of(config, name)) is None:
            continue
        row: dict[str, Any] = dict.fromkeys(LADDER_COLUMNS, np.nan) | dict.fromkeys(("arm", "verdict", "note"), "")
        row |= {"family": cell[0], "given": cell[1], "generator": name, "stands_for": stands_for(config, name)}
        row |= {"fid": _fid(image_quality, name, WHOLE), "fid_lungs": _fid(image_quality, name, LUNGS)}
        if fidelity is not None and len(found := fidelity[fidelity["generator"] == name]):
            row |= {"fidelity_dice": found["dice_mean"].iloc[0], "fidelity_difference": found["difference"].iloc[0]}
        arm = _largest_arm(config, name)
        if arm is not None and arm.name in deciding.index:
            of_arm = deciding.loc[arm.name]
            row |= {"arm": arm.name, **of_arm[["difference", "ci_low", "ci_high", "verdict"]]}
        rows.append(row)
    there = {row["stands_for"] for row in rows}
    rows += [row for row in _published_cells() if row["stands_for"] not in there]
    rows.sort(key=lambda row: (row["family"], GIVEN.index(row["given"])))
    return pd.DataFrame(rows, columns=LADDER_COLUMNS)


def _published_cells() -> list[dict[str, Any]]:
    """The cells of all published methods, without a generator."""
    cells = {method: (_UNCONDITIONAL, NOTHING, reason) for method, reason in WITHOUT_LAYOUT.items()}
    for declared in map(generators.plugin, generators.names()):
        for given, method in declared.published_as.items():
            cells[method] = (str(declared.family), given, NOT_IN_RUN)
    return [
        {
            "family": family,
            "given": given,
            "generator": "",
            "stands_for": method,
            "arm": "",
            "verdict": "",
            "note": note,
        }
        for method, (family, given, note) in cells.items()
    ]


def _fid(image_quality: pd.DataFrame | None, generator: str, region: str) -> float:
    if image_quality is None:
        return np.nan
    rows = image_quality[
        (image_quality["generator"] == generator) & (image_quality["image"] == SYNTHETIC)
        & (image_quality["region"] == region) & (image_quality["metric"] == "fid")
    ]  # fmt: skip
    return float(rows["mean"].iloc[0]) if len(rows) else np.nan


def _largest_arm(config: Config, generator: str) -> Arm | None:
    """The arm with a generator's largest dose and the most real cases; None if it only has synthetic-only arms."""
    arms = [
        arm
        for arm in config.arms.all()
        if arm.real
        and not arm.filtered
        and arm.generator == generator
        and arm.real_cases == config.arms.largest_number()
    ]
    return max(arms, key=lambda arm: arm.dose, default=None)
