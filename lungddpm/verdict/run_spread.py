"""How much the training runs of each arm scatter, and whether those of one arm scatter more than chance explains.

The statistic is Cochran's C (1941, Annals of Eugenics 11:47): the mean square of an arm as a share of the sum over
arms. It is computed twice. Arms share replicates (fold x seed), and the common effect of a replicate on all arms is not
the scatter of one arm. So it is removed once, which mixes the residuals of the arms, and left in once: then C is more
powerful if replicates have little effect, and conservative if they have much. The test uses the smaller p of the two,
compared with the smaller p of simulated tables: normal runs of equal variance, without an effect of replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lungddpm.core.arms import is_baseline

COLUMNS = ["arm", "n_replicates", "mean", "sd", "lowest", "highest", "range", "p"]
_DRAWS = 20_000
_NO_DF = 1e-9
_ROUNDING = 1e-18
"""Squares of scores between 0 and 1 below this are rounding."""


def run_spread_table(
    arms: list[str], means: np.ndarray, replicates: list[list[int]], seed: int, groups: Sequence[int] | None = None
) -> pd.DataFrame:
    """The spread of every arm's runs.

    Args:
        arms: their names.
        means: (arms, runs), each run's mean score over cases; NaN if a run is missing.
        replicates: the runs of each independent replicate; those of one fold share its split and are averaged for p.
        seed: of the draws behind p.
        groups: see `spread_test`.

    Returns:
        `COLUMNS`, a row per arm: mean, sd, lowest, highest and range of the runs' means, and p of `spread_test`.
    """
    independent = np.column_stack([pd.DataFrame(means[:, runs]).mean(axis=1) for runs in replicates])
    rows = []
    for arm, of_arm, p in zip(arms, means, spread_test(independent, seed, groups=groups), strict=True):
        runs = of_arm[np.isfinite(of_arm)]
        values = [math.nan] * 5
        if runs.size:
            sd = float(runs.std(ddof=1)) if runs.size > 1 else math.nan
            values = [float(runs.mean()), sd, float(runs.min()), float(runs.max()), float(np.ptp(runs))]
        rows.append((arm, runs.size, *values, p))
    return pd.DataFrame(rows, columns=COLUMNS)


def spread_test(means: np.ndarray, seed: int, draws: int = _DRAWS, groups: Sequence[int] | None = None) -> np.ndarray:
    """Test every arm for a spread wider than that of the others.

    Args:
        means: (arms, independent replicates), NaN if one is missing.
        seed: of the draws.
        draws: number of simulated tables with equal spread.
        groups: group index of each arm: replicate effects differ between groups; None if there is one group.

    Returns:
        (arms,): the probability that some arm scatters as much as this one if the runs of all arms scatter alike, so it
        is corrected for the number of arms. NaN if it is not known: for arms with one replicate, and if fewer than two
        arms have more, or nothing differs.
    """
    p = np.full(len(means), math.nan)
    arm, replicate = np.nonzero(np.isfinite(means))
    several = np.bincount(arm, minlength=len(means)) > 1
    if np.count_nonzero(several) < 2:
        return p
    group = np.zeros(len(means), int) if groups is None else np.array(groups)
    of_arm, of_replicate = np.eye(len(means))[arm], np.eye(means.size)[group[arm] * means.shape[1] + replicate]
    designs = [of_arm]
    if np.count_nonzero(several) > 2:  # with two arms, both have the same residual of arm + replicate
        designs.append(np.hstack([of_arm, of_replicate]))
    tables = np.vstack([means[arm, replicate], np.random.default_rng(seed).normal(size=(draws, arm.size))])
    smaller = np.ones((len(tables), np.count_nonzero(several)))
    for design in designs:
        to_residuals = np.eye(arm.size) - design @ np.linalg.pinv(design)
        squares = (tables @ to_residuals) ** 2
        if squares[0].max() < _ROUNDING:
            return p
        df = (np.diag(to_residuals) @ of_arm)[several]
        df[df < _NO_DF] = math.inf  # runs in replicates without another arm leave nothing to compare
        shares = (squares @ of_arm)[:, several] / df / squares.sum(axis=1, keepdims=True)
        smaller = np.minimum(smaller, _share_reaching(shares.max(axis=1)[1:], shares))
    p[several] = _share_reaching(-smaller.min(axis=1)[1:], -smaller)[0]
    return p


def _share_reaching(drawn: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of the drawn numbers, counting the value itself, that are as large as each value."""
    below = np.searchsorted(np.sort(drawn), values - 1e-12)
    return (1 + len(drawn) - below) / (1 + len(drawn))


def spread_notes(table: pd.DataFrame, measure: str, significance: float) -> list[str]:
    """A sentence for each arm whose runs scatter more than those of the others, beyond chance.

    Args:
        table: of `run_spread_table`.
        measure: display name of the measure.
        significance: p below it is beyond chance.
    """
    notes = []
    for row in table[table["p"] < significance].to_dict("records"):
        others = table.loc[table["arm"] != row["arm"], "sd"].dropna()
        range_of_others = " to ".join(dict.fromkeys(f"{sd:.3f}" for sd in (others.min(), others.max())))
        concerned = "every arm compared with it" if is_baseline(row["arm"]) else "this arm"
        notes.append(
            f"Training runs of {row['arm']} scatter more than those of the other arms, beyond chance (sd of mean "
            f"{measure} {row['sd']:.3f} over {row['n_replicates']} replicates; others {range_of_others}). "
            "The comparison assumes that the runs of all arms scatter alike: its claims about "
            f"{concerned} are less certain than p suggests."
        )
    return notes
