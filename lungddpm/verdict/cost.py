"""Quality against cost: what a volume of each generator costs, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from lungddpm.config.models import Config
from lungddpm.generators import NODULES_PER_CASE
from lungddpm.quality.calibration import DIFFERENCE, NODULES
from lungddpm.quality.image_quality import LUNGS, OTHER_PATIENTS, SYNTHETIC
from lungddpm.quality.label_fidelity import REAL_CT
from lungddpm.verdict.records import DRAWING_COLUMNS

_OF_SETS = {"fid": "fid_lungs", "kid": "kid_lungs"}
QUALITY_COLUMNS = ["label_fidelity_dice", "nodule_hu_difference", *_OF_SETS.values(), "kid_lungs_standard_error"]
COLUMNS = ["generator", "function_evaluations", *DRAWING_COLUMNS[1:], *QUALITY_COLUMNS, "extractor"]


def function_evaluations(config: Config, generator: str, nodules: float = NODULES_PER_CASE) -> float:
    """Forward passes of a network per volume: 0 without a network, NaN for CT of another system.

    Args:
        config: of the run.
        generator: in use.
        nodules: of a volume, on average; matters to generators that draw nodule by nodule.
    """
    if generator in config.arms.external:
        return math.nan
    declared = config.plugin_of(generator)
    if declared.drawing is None:
        return 0.0
    return declared.drawing(config.for_generator(generator)).passes_for(nodules)


def cost_table(config: Config, drawing: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Cost and quality of every generator, preceded by the quality of real CT: `COLUMNS`.

    Args:
        config: of the run.
        drawing: of `records.drawing_costs`.
        tables: `image_quality` and `label_fidelity` are used, if the run has them.

    Returns:
        One row per generator, controls included; NaN if not measured. For real CT: the label fidelity Dice of the
        references, and FID and KID of other patients against them.
    """
    quality, fidelity = tables.get("image_quality"), tables.get("label_fidelity")
    rows = [{"generator": REAL_CT, **_quality(None, quality), **_fidelity(REAL_CT, fidelity)}]
    for row in drawing.to_dict("records"):
        name = row["generator"]
        measured = {**_quality(name, quality), **_fidelity(name, fidelity)}
        nodules = NODULES_PER_CASE if math.isnan(row["nodules_per_volume"]) else row["nodules_per_volume"]
        rows.append({**row, "function_evaluations": function_evaluations(config, name, nodules), **measured})
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"n_volumes": "Int64"})
    return table.fillna({"device": "", "extractor": ""})


def _fidelity(name: str, table: pd.DataFrame | None) -> dict[str, float]:
    dice = {} if table is None else table.set_index("generator")["dice_mean"].to_dict()
    return {"label_fidelity_dice": dice.get(name, math.nan)}


def _quality(name: str | None, table: pd.DataFrame | None) -> dict[str, float | str]:
    """Nodule HU, FID and KID of a generator; None: of other real patients."""
    if table is None:
        return {}
    if name is None:
        # Their distance to the references does not depend on the generator.
        chosen = table[table["image"] == OTHER_PATIENTS].drop_duplicates(["region", "metric"])
    else:
        chosen = table[(table["generator"] == name) & (table["image"] == SYNTHETIC)]
    rows = chosen.set_index(["region", "metric"]).to_dict("index")
    found: dict[str, float | str] = {}
    if (NODULES, DIFFERENCE) in rows:
        found["nodule_hu_difference"] = rows[NODULES, DIFFERENCE]["mean"]
    for metric, column in _OF_SETS.items():
        if (LUNGS, metric) in rows:
            row = rows[LUNGS, metric]
            found |= {column: row["mean"], "extractor": row["extractor"]}
            if metric == "kid":
                found[f"{column}_standard_error"] = row["standard_error"]
    return found
