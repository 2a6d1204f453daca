"""Texture of the nodules of a layout: from readers' ratings of the real nodules that they are, or were made from.

A layout does not contain it, and most generators do not know it. So recall by texture shows how a generator draws
nodules of a kind, compared with real ones of that kind. If it draws all of them solid, segmenters find more of the
ground glass than in real CT.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import pandas as pd

from lungddpm.core.cases import ADDED, NODULES
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.evaluation.lesions import texture_class


@dataclass(frozen=True)
class KnownNodule:
    """A nodule of a layout.

    Attributes:
        position_mm: RAS.
        texture: one of `lesions.TEXTURES`, or empty if not rated.
    """

    position_mm: tuple[float, float, float]
    texture: str


class RealNodules:
    """The nodules of the real cases.

    Args:
        cases_table: `cases.tsv`, next to `nodules.tsv`; without that, no nodule is known.
    """

    def __init__(self, cases_table: Path):
        path = cases_table.with_name(NODULES)
        table = pd.read_csv(path, sep="\t", dtype={"case_id": str}) if path.exists() else pd.DataFrame()
        self._of_case: dict[str, dict[int, KnownNodule]] = {}
        for row in table.to_dict("records"):
            position = tuple(row[f"centroid_{axis}_mm"] for axis in "xyz")
            self._of_case.setdefault(row["case_id"], {})[row["nodule"]] = KnownNodule(
                position, texture_class(row["texture"])
            )

    def of_case(self, case_id: str) -> list[KnownNodule]:
        """The nodules of a real case."""
        return list(self._of_case.get(case_id, {}).values())

    def of_sample(self, record: Mapping[str, Any], reference: str, *, own_layout: bool) -> list[KnownNodule]:
        """The nodules of a synthetic case: the remaining ones of its reference, and the placed ones.

        Args:
            record: its `sample.json`.
            reference: the case that its CT was made from; empty if there is none.
            own_layout: it has the layout of that case.
        """
        own = self.of_case(reference) if own_layout or record.get("layout_origin") == ADDED else []
        placed = [
            KnownNodule(tuple(nodule["position_mm"]), known.texture)
            for nodule in record.get("nodules", [])
            if (known := self._of_case.get(nodule.get("case_id"), {}).get(nodule.get("nodule"))) is not None
        ]
        return [*own, *placed]


def lesion_textures(layout: Volume, nodules: Iterable[KnownNodule]) -> list[str]:
    """The texture of each lesion of a layout, in the order of `lesion_measures`.

    A nodule belongs to the lesion at or next to its position. If nodules of several textures merged on the grid, or
    none is known, the texture is empty.

    Args:
        layout: labels.
        nodules: of that layout, as far as they are known.
    """
    numbers, count = cc3d.connected_components(layout.array == Label.NODULE, connectivity=26, return_N=True)
    voxels = np.argwhere(numbers)
    found: list[set[str]] = [set() for _ in range(count)]
    for nodule in nodules:
        at = np.linalg.solve(layout.affine, [*nodule.position_mm, 1])[:3]
        apart = np.linalg.norm(voxels - at, axis=1)
        # A voxel diagonal: centres may be rounded, or in the concavity of a nodule.
        if count and apart.min() <= math.sqrt(3):
            found[numbers[tuple(voxels[apart.argmin()])] - 1].add(nodule.texture)
    return [textures.pop() if len(textures) == 1 else "" for textures in found]
