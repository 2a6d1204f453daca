"""Have the segmenters converged? Arms compared while still learning may only differ in how fast they learn."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

COLUMNS = ["arm", "measure", "change", "change_of_whole", "standard_error", "p"]
LOSS, DICE = "training_loss", "pseudo_dice"
"""Mean loss of the training patches and Dice of the validation patches since the previous saved state."""
_FEWEST = 3
"""Points per line; fewer leave no residual to estimate the scatter from."""


def convergence_table(curves: pd.DataFrame) -> pd.DataFrame:
    """How much each arm's segmenters still learn in the last third of training.

    A straight line is fitted to the last third of each replicate's curve, which must have at least three saved states;
    slopes are averaged over replicates and compared with the residual scatter, pooled over all runs.

    Args:
        curves: arm, replicate, step, training_loss, pseudo_dice; one row per saved state.

    Returns:
        `COLUMNS`, for each arm and measure that can be judged: `change` over the last third (negative: the loss still
        falls), its share of the change over the whole training, its standard error, and the one-sided p that it is
        still learning. Empty if curves are too short.
    """
    rows = []
    for measure, learning in ((LOSS, -1), (DICE, 1)):
        fits = [
            (arm, *fit)
            for (arm, _), curve in curves.groupby(["arm", "replicate"], sort=False)
            if (fit := _last_third(curve.sort_values("step"), measure)) is not None
        ]
        if not fits:
            continue
        table = pd.DataFrame(fits, columns=["arm", "change", "whole", "squares", "df", "leverage"])
        df = int(table["df"].sum())
        scatter = float(table["squares"].sum()) / df
        for arm, of_arm in table.groupby("arm", sort=False):
            change, whole = float(of_arm["change"].mean()), float(of_arm["whole"].mean())
            error = math.sqrt(scatter * float(of_arm["leverage"].sum())) / len(of_arm)
            p = float(stats.t.sf(learning * change / error, df)) if error else float(learning * change <= 0)
            rows.append((arm, measure, change, change / whole if whole else math.nan, error, p))
    return pd.DataFrame(rows, columns=COLUMNS)


def _last_third(curve: pd.DataFrame, measure: str) -> tuple[float, float, float, int, float] | None:
    """Change along the line, change over the whole training, residual sum of squares and its degrees of freedom, and
    the factor from the residual variance to that of the change; None if the curve is too short."""
    curve = curve.dropna(subset=measure)
    n_points = math.ceil(len(curve) / 3)
    if len(curve) <= _FEWEST:
        return None
    steps, values = curve["step"].to_numpy(float), curve[measure].to_numpy(float)
    last, y = steps[-max(n_points, _FEWEST) :], values[-max(n_points, _FEWEST) :]
    third = steps[-1] / 3
    slope, intercept = np.polyfit(last, y, 1)
    residual = y - (slope * last + intercept)
    leverage = third**2 / float(((last - last.mean()) ** 2).sum())
    whole = slope * steps[-1] + intercept - values[0]
    return slope * third, whole, float(residual @ residual), len(last) - 2, leverage
