"""How far the training runs of each arm scatter, and whether one arm's scatter more than the others' beyond chance.

The statistic is Cochran's C (1941, Annals of Eugenics 11:47): an arm's mean square as a share of those of all arms. It
is taken twice. Arms share replicates (fold x seed), and what a replicate does to all arms alike is not the scatter of a
single one. So it is taken out, at the price that the arms' residuals mix. It is also left in: then C is sharper where
replicates do little, and too even, never too uneven, where they do much. The smaller p of the two counts, and is
compared with the smaller p of tables drawn from runs that scatter alike, normally, without an effect of replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

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
        means: (arms, runs), each run's mean score over cases; NaN where a run is missing.
        replicates: the runs of each independent replicate; those of one fold share its luck and are averaged for p.
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
        means: (arms, independent replicates), NaN where one is missing.
        seed: of the draws.
        draws: tables with equal spread to compare with.
        groups: a number for each arm below that of the arms: replicates have other effects in each group; None where
            there is one group.

    Returns:
        (arms,): the probability that some arm stands out as far as this one if the runs of all arms scatter alike; so
        it is corrected for the number of arms. NaN where it is not known: for arms of one replicate, and where fewer
        than two arms have more, or nothing differs.
    """
    p = np.full(len(means), math.nan)
    arm, replicate = np.nonzero(np.isfinite(means))
    several = np.bincount(arm, minlength=len(means)) > 1
    if np.count_nonzero(several) < 2:
        return p
    group = np.zeros(len(means), int) if groups is None else np.array(groups)
    of_arm, of_replicate = np.eye(len(means))[arm], np.eye(means.size)[group[arm] * means.shape[1] + replicate]
    designs = [of_arm]
    if np.count_nonzero(several) > 2:  # of two arms, what is left of arm + replicate is the same in both
        designs.append(np.hstack([of_arm, of_replicate]))
    tables = np.vstack([means[arm, replicate], np.random.default_rng(seed).normal(size=(draws, arm.size))])
    smaller = np.ones((len(tables), np.count_nonzero(several)))
    for design in designs:
        to_residuals = np.eye(arm.size) - design @ np.linalg.pinv(design)
        squares = (tables @ to_residuals) ** 2
        if squares[0].max() < _ROUNDING:
            return p
        df = (np.diag(to_residuals) @ of_arm)[several]
        df[df < _NO_DF] = math.inf  # runs in replicates that no other arm has leave nothing to compare
        shares = (squares @ of_arm)[:, several] / df / squares.sum(axis=1, keepdims=True)
        smaller = np.minimum(smaller, _share_reaching(shares.max(axis=1)[1:], shares))
    p[several] = _share_reaching(-smaller.min(axis=1)[1:], -smaller)[0]
    return p


def _share_reaching(drawn: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of the drawn numbers, and of the value itself with them, that are as large as each value."""
    below = np.searchsorted(np.sort(drawn), values - 1e-12)
    return (1 + len(drawn) - below) / (1 + len(drawn))


def spread_notes(table: pd.DataFrame, measure: str, significance: float) -> list[str]:
    """A sentence for each arm whose runs scatter more than those of the others beyond chance.

    Args:
        table: of `run_spread_table`, the arm that the others are compared with first.
        measure: what the means are of, in prose.
        significance: p below it is beyond chance.
    """
    notes = []
    for row in table[table["p"] < significance].to_dict("records"):
        others = table.loc[table["arm"] != row["arm"], "sd"].dropna()
        range_of_others = " to ".join(dict.fromkeys(f"{sd:.3f}" for sd in (others.min(), others.max())))
        concerned = "every arm" if row["arm"] == table["arm"].iloc[0] else "this arm"
        notes.append(
            f"Training runs of {row['arm']} scatter more than those of the other arms, beyond chance (sd of mean "
            f"{measure} {row['sd']:.3f} over {row['n_replicates']} replicates; others {range_of_others}). "
            "The comparison assumes that the runs of all arms scatter alike: what it claims about "
            f"{concerned} is less certain than its p says."
        )
    return notes
