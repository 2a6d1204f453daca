"""How far the training runs of each arm scatter, and whether one arm's scatter more than the others' beyond chance.

Arms share replicates (fold x seed), so what a replicate does to all arms alike is no scatter of a single one: spread is
compared in the residuals of arm + replicate. The statistic is Cochran's C (1941, Annals of Eugenics 11:47), an arm's
share of the residual mean squares. Residuals of so small a table depend on each other; but if scatter is normal, the
distribution of C depends on nothing except which runs there are, so it is drawn instead of looked up.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

COLUMNS = ["arm", "n_replicates", "mean", "sd", "lowest", "highest", "range", "residual_sd", "p"]
_DRAWS = 20_000
_ROUNDING = 1e-18
"""Mean squares of scores between 0 and 1 below this are rounding."""


def run_spread_table(arms: list[str], means: np.ndarray, seed: int) -> pd.DataFrame:
    """The spread of every arm's runs.

    Args:
        arms: their names.
        means: (arms, replicates), each run's mean score over cases; NaN where a run is missing.
        seed: of the draws behind p.

    Returns:
        `COLUMNS`, a row per arm. sd, lowest, highest and range are those of the runs' means; residual_sd is the sd
        without what a replicate does to all arms. p: the probability that some arm stands out as far as this one if
        the runs of all arms scatter alike; so it is corrected for the number of arms. NaN where it is not known.
    """
    residual_sd, p = spread_test(means, seed)
    rows = []
    for number, (arm, of_arm) in enumerate(zip(arms, means, strict=True)):
        runs = of_arm[np.isfinite(of_arm)]
        if runs.size:
            sd = float(runs.std(ddof=1)) if runs.size > 1 else math.nan
            values = [float(runs.mean()), sd, float(runs.min()), float(runs.max()), float(np.ptp(runs))]
        else:
            values = [math.nan] * 5
        rows.append((arm, runs.size, *values, residual_sd[number], p[number]))
    return pd.DataFrame(rows, columns=COLUMNS)


def spread_test(means: np.ndarray, seed: int, draws: int = _DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """Test every arm for a spread wider than that of all arms together.

    Of two arms, residuals of arm + replicate mirror each other and cannot tell which one scatters. There only the arms'
    own means are taken out, which makes the test careful where replicates do much to both.

    Args:
        means: (arms, replicates), NaN where a run is missing.
        seed: of the draws.
        draws: tables with equal spread to compare with.

    Returns:
        (residual_sd, p), one of each per arm; NaN for arms whose spread cannot be known.
    """
    residual_sd, p = np.full(len(means), math.nan), np.full(len(means), math.nan)
    arm, replicate = np.nonzero(np.isfinite(means))
    if not arm.size:
        return residual_sd, p
    effects = [np.eye(len(means))[arm]]
    if len(np.unique(arm)) > 2:
        effects.append(np.eye(means.shape[1])[replicate])
    design = np.hstack(effects)
    to_residuals = np.eye(arm.size) - design @ np.linalg.pinv(design)
    of_arm = np.eye(len(means))[arm]
    # Residual degrees of freedom of each arm; they add up to those of the whole table.
    df = np.diag(to_residuals) @ of_arm
    known = df > 1e-9
    if np.count_nonzero(known) < 2:
        return residual_sd, p

    def mean_squares(tables: np.ndarray) -> np.ndarray:
        return ((tables @ to_residuals) ** 2 @ of_arm)[:, known] / df[known]

    found = mean_squares(means[arm, replicate][None])[0]
    residual_sd[known] = np.sqrt(found)
    if found.max() < _ROUNDING:
        return residual_sd, p
    drawn = mean_squares(np.random.default_rng(seed).normal(size=(draws, arm.size)))
    widest = np.sort(drawn.max(axis=1) / (drawn @ df[known]))
    as_wide = draws - np.searchsorted(widest, found / (found @ df[known]) * (1 - 1e-12))
    p[known] = (1 + as_wide) / (1 + draws)
    return residual_sd, p


def spread_notes(table: pd.DataFrame, measure: str, significance: float) -> list[str]:
    """A sentence for each arm whose runs scatter more than those of the others beyond chance.

    Args:
        table: of `run_spread_table`.
        measure: what the means are of, in prose.
        significance: p below it is beyond chance.
    """
    notes = []
    for row in table[table["p"] < significance].to_dict("records"):
        others = table.loc[table["arm"] != row["arm"], "sd"].dropna()
        notes.append(
            f"Training runs of {row['arm']} scatter more than those of the other arms (sd of mean {measure} "
            f"{row['sd']:.3f} over {row['n_replicates']} replicates; others {others.min():.3f} to {others.max():.3f}), "
            "beyond chance. The comparison takes all arms' runs to scatter alike: what it claims of this arm is less "
            "certain than its p says."
        )
    return notes
