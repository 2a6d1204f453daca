"""The Python interface: single steps of the benchmark on arrays and tables, without a run and its folders.

The stages of the command line call the same functions. `import lungddpm` makes them available as
`lungddpm.make_layout` and so on, and loads what each needs when it is called.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.cases import CaseFolder, check_case
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume

if TYPE_CHECKING:
    import pandas as pd

    from lungddpm.config.models import Config


def read_case(folder: Path | str) -> tuple[Volume, Volume]:
    """CT and layout of a case or of a sample that a run has made.

    Args:
        folder: e.g. `results/cases/<case_id>` or `results/synthetic/<generator>/<cohort>/<sample>`.

    Returns:
        int16 HU and uint8 labels (see `lungddpm.core.labels.Label`), (x, y, z), RAS+, on one grid.

    Raises:
        InputError: a file is missing or unreadable.
        ExcludedCaseError: CT and layout do not match.
    """
    return CaseFolder(Path(folder)).read()


def make_layout(ct: Volume, nodules: np.ndarray | None = None, config: Config | None = None) -> tuple[Volume, Volume]:
    """Segment lungs and vessels, and take CT, lungs, vessels and nodules to the model grid.

    Args:
        ct: (x, y, z) HU of a whole chest, in its own resolution, in any orientation.
        nodules: (x, y, z) bool, nodule mask; None if the CT has none.
        config: `grid` and `layouts` are used; None takes the defaults.

    Returns:
        The CT, int16 HU, and its layout, uint8 labels, on the model grid.

    Raises:
        InputError: mask and CT differ in shape.
        ExcludedCaseError: CT not in HU, lungs cut off, or a layout outside `layouts.limits`.
    """
    from lungddpm.config.models import Config
    from lungddpm.layouts.compose import build_case
    from lungddpm.sources import Scan

    labels = None
    if nodules is not None:
        if nodules.shape != ct.shape:
            raise InputError("nodules", f"has shape {nodules.shape}, the CT {ct.shape}", "Put both on the same grid.")
        labels = np.where(nodules, Label.NODULE, Label.BACKGROUND).astype(np.uint8)
    case = build_case(Scan(ct, labels=labels), config or Config())
    return case.ct, case.layout


def synthesize(
    ct: Volume,
    layout: Volume,
    generator: str = "lung_ddpm",
    weights: Path | str | None = None,
    seed: int = 0,
    config: Config | None = None,
    device: str = "auto",
) -> Volume:
    """Draw a synthetic CT for a layout.

    Args:
        ct: HU of the reference, which fills what the layout leaves open.
        layout: labels, on the grid of the CT.
        generator: see `arms.generators` in config/README.md.
        weights: for trained generators: a `model.safetensors` or a published `.pt`.
        seed: for all random numbers; the same seed gives the same CT on the same machine.
        config: `generators` and `grid` are used; its grid must be that of the weights. None takes the defaults.
        device: `auto`, `cpu`, `cuda`, `cuda:<number>` or `mps`.

    Returns:
        int16 HU, on the grid of the CT.

    Raises:
        ConfigError: unknown generator or device, or a generator that takes nodules from other cases.
        InputError: weights are missing or do not fit the generator.
        ExcludedCaseError: CT and layout do not match.
    """
    from lungddpm.config.models import Config
    from lungddpm.generators import ADDED, Task

    check_case(ct, layout, "the reference")
    settings = config or Config()
    chosen = settings.plugin_of(generator)
    if chosen.layouts[0] == ADDED:
        raise ConfigError(generator, "takes nodules from other cases", "Use 'lungddpm synthesize' on a table of cases.")
    if settings.weights_owner(generator) is not None and weights is None:
        raise InputError(f"generator '{generator}'", "needs weights", "Pass the path of a model.safetensors.")
    own = settings.for_generator(generator)
    ready = chosen.load(own, None if weights is None else Path(weights), device)
    (hu,) = ready.make([Task(ct, layout, seed)])
    return ct.like(hu)


def measure(prediction: Volume, truth: Volume) -> dict[str, float]:
    """Compare a predicted nodule mask with the true one.

    Args:
        prediction: (x, y, z), 0 or False outside nodules.
        truth: the same, on the same grid.

    Returns:
        All measures in docs/reference/measures.md by column, e.g. `dice` and `hausdorff_95_mm`; NaN if undefined.

    Raises:
        InputError: the two masks are on different grids.
    """
    from lungddpm.evaluation.measures import MaskPair, measure_masks

    if not prediction.same_grid(truth):
        raise InputError("prediction", "is not on the grid of the truth", "Resample it first.")
    return measure_masks(MaskPair(truth.like(truth.array != 0), prediction.like(prediction.array != 0)))


def compare(
    scores: pd.DataFrame, measure: str = "dice", baseline: str = "real", confidence: float = 0.95
) -> pd.DataFrame:
    """Reach a verdict on every arm: is it better than the baseline on the same cases, beyond run-to-run variation?

    Args:
        scores: one row per arm, training run and test case: columns `arm`, `fold`, `seed`, `case_id`, and the measure,
            which is between 0 and 1, larger being better.
        measure: column to compare.
        baseline: arm to compare the others with.
        confidence: level of the intervals and of the decision (Holm's correction over the arms).

    Returns:
        One row per arm, the baseline first: columns as in `verdict.csv` (docs/reference/files.md), with `verdict` and
        `sentence`.

    Raises:
        InputError: a column or the baseline is missing, or a run does not cover the same cases as the others.
    """
    import pandas as pd

    from lungddpm.verdict.statistics import compare_arms, sentence
    from lungddpm.verdict.tables import collect_scores

    if missing := [name for name in ("arm", "fold", "seed", "case_id", measure) if name not in scores]:
        raise InputError("scores", f"has no column {', '.join(missing)}", "See lungddpm.compare.")
    if baseline not in set(scores["arm"]):
        raise InputError("scores", f"has no arm '{baseline}'", "Set `baseline` to the arm to compare with.")
    arms = [baseline, *(arm for arm in scores["arm"].unique() if arm != baseline)]
    runs = scores[["fold", "seed"]].drop_duplicates().sort_values(["fold", "seed"])
    folds = {f"{fold}-{seed}": int(fold) for fold, seed in runs.itertuples(index=False)}
    named = scores.assign(replicate=[f"{row.fold}-{row.seed}" for row in scores[["fold", "seed"]].itertuples()])
    comparisons = compare_arms(collect_scores(named, arms, folds, measure), _BOOTSTRAPS, confidence, seed=0)
    rows = [
        {"arm": arm, **asdict(found), "sentence": sentence(arm, baseline, measure, found, confidence) if number else ""}
        for number, (arm, found) in enumerate(zip(arms, comparisons, strict=True))
    ]
    return pd.DataFrame(rows)


_BOOTSTRAPS = 10_000
