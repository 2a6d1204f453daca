"""FROC: the share of lesions found by candidates against their false positives per scan.

Every score is a threshold: candidates of at least that score count, those of equal score together. Between two
thresholds, and from no candidates to the first, the curve is a straight line; above the highest rate that candidates
reach it is constant. This, the seven rates, and their mean sensitivity (CPM, competition performance
metric) are as in LUNA16 (Setio et al. 2017, Medical Image Analysis 42:1) after Niemeijer et al. (2011), IEEE
Transactions on Medical Imaging 30:215.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which sensitivity is read; CPM is the mean over them."""
FROC_COLUMNS = ["arm", "replicate", "false_positives_per_scan", "sensitivity"]
BAND_COLUMNS = ["arm", "false_positives_per_scan", "sensitivity", "ci_low", "ci_high"]
CPM_COLUMNS = ["arm", "cpm", "cpm_ci_low", "cpm_ci_high"]
# Every fourth is one of the seven.
_CURVE_RATES = 2.0 ** (np.arange(-12, 13) / 4)
_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Findings:
    """The results of one replicate's candidates in all its scans."""

    n_scans: int
    lesion_scores: np.ndarray
    """(lesions,): highest score of the candidates that hit the lesion, NaN if none does."""
    lesion_scans: np.ndarray
    """(lesions,) int: index of the scan of each."""
    false_scores: np.ndarray
    """(false positives,): scores of the candidates that hit no lesion."""
    false_scans: np.ndarray
    """(false positives,) int."""

    def sensitivity(self, rates: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sensitivity at rates of false positives per scan, with weighted scans.

        Args:
            rates: (rates,), ascending, above 0.
            weights: (draws, scans): all ones for the original scans, counts for a bootstrap.

        Returns:
            (draws, rates), NaN for a draw without a lesion.
        """
        cuts = np.unique(np.concatenate([self.false_scores, self.lesion_scores[np.isfinite(self.lesion_scores)]]))
        n_lesions = np.bincount(self.lesion_scans, minlength=self.n_scans)
        with np.errstate(invalid="ignore"):
            found = self._at_least(cuts, self.lesion_scores, self.lesion_scans)
            found = weights @ found / (weights @ n_lesions)[:, None]
        false = weights @ self._at_least(cuts, self.false_scores, self.false_scans) / weights.sum(axis=1)[:, None]
        return np.array([np.interp(rates, x, y) for x, y in zip(false, found, strict=True)])

    def _at_least(self, cuts: np.ndarray, scores: np.ndarray, scans: np.ndarray) -> np.ndarray:
        """(scans, 1 + cuts): number of scores at or above each cut, cuts descending; the first column is 0."""
        counts = np.zeros((self.n_scans, len(cuts) + 1))
        known = np.isfinite(scores)
        np.add.at(counts, (scans[known], len(cuts) - np.searchsorted(cuts, scores[known])), 1)
        return counts.cumsum(axis=1)


def findings_of(cases: pd.DataFrame, lesions: pd.DataFrame, candidates: pd.DataFrame) -> Findings | None:
    """The candidates in one replicate's tables; None if its predictions have no probabilities.

    Args:
        cases: rows of `metrics.csv` (`case_id`, `n_candidates`).
        lesions: rows of `lesions.csv` (`case_id`, `score`).
        candidates: rows of `candidates.csv` (`case_id`, `score`, `lesions`).
    """
    if cases["n_candidates"].isna().any():
        return None
    scan = pd.Series(np.arange(len(cases)), index=sorted(cases["case_id"]))
    false = candidates[candidates["lesions"].isna()]
    return Findings(
        len(cases),
        lesions["score"].to_numpy(float),
        scan.loc[lesions["case_id"]].to_numpy(int),
        false["score"].to_numpy(float),
        scan.loc[false["case_id"]].to_numpy(int),
    )


def froc_tables(
    cases: pd.DataFrame, lesions: pd.DataFrame, candidates: pd.DataFrame, confidence: float, seed: int
) -> dict[str, pd.DataFrame]:
    """FROC of all arms; arms without a lesion, or a replicate without probabilities, are left out.

    Bands are pointwise percentile limits of the mean over replicates under 1,000 resamples; each draws replicates, then
    cases, one set for all arms and replicates. They are descriptive only.

    Args:
        cases: `metrics.csv` of all arms and replicates, with both as columns; each has the same cases.
        lesions: `lesions.csv`, likewise.
        candidates: `candidates.csv`, likewise.
        confidence: level of the bands.
        seed: of the resampling.

    Returns:
        `froc`: `FROC_COLUMNS` at `RATES`. `froc_band`: `BAND_COLUMNS`, mean over replicates, at finer rates.
        `cpm`: `CPM_COLUMNS`, one row per arm.
    """
    of_replicate = {
        keys: found
        for keys, scored in cases.groupby(["arm", "replicate"], sort=False)
        if (found := findings_of(scored, _rows(lesions, keys), _rows(candidates, keys))) is not None
        and len(found.lesion_scores)
    }
    at_seven = np.isin(_CURVE_RATES, RATES)
    points, bands, cpm = [], [], []
    for arm in dict.fromkeys(arm for arm, _ in of_replicate):
        replicates = {replicate: found for (name, replicate), found in of_replicate.items() if name == arm}
        generator = np.random.default_rng(seed)
        n_scans = next(iter(replicates.values())).n_scans
        weights = np.vstack([np.ones(n_scans), _draws(n_scans, generator)])
        curves = np.stack([found.sensitivity(_CURVE_RATES, weights) for found in replicates.values()])
        for replicate, curve in zip(replicates, curves[:, 0, at_seven], strict=True):
            keys = {"arm": arm, "replicate": replicate}
            points.append(pd.DataFrame(keys | {"false_positives_per_scan": RATES, "sensitivity": curve}))
        drawn = np.einsum("br,rbk->bk", _draws(len(replicates), generator) / len(replicates), curves[:, 1:])
        tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = np.nanquantile(drawn, tails, axis=0)
        mean = curves[:, 0].mean(axis=0)
        bands.append(pd.DataFrame(dict(zip(BAND_COLUMNS, (arm, _CURVE_RATES, mean, low, high), strict=True))))
        limits = np.nanquantile(drawn[:, at_seven].mean(axis=1), tails)
        cpm.append(dict(zip(CPM_COLUMNS, (arm, mean[at_seven].mean(), *limits), strict=True)))
    return {
        "froc": pd.concat(points, ignore_index=True) if points else pd.DataFrame(columns=FROC_COLUMNS),
        "froc_band": pd.concat(bands, ignore_index=True) if bands else pd.DataFrame(columns=BAND_COLUMNS),
        "cpm": pd.DataFrame(cpm, columns=CPM_COLUMNS),
    }


def _rows(table: pd.DataFrame, keys: tuple[str, str]) -> pd.DataFrame:
    return table[(table["arm"] == keys[0]) & (table["replicate"] == keys[1])]


def _draws(n: int, generator: np.random.Generator) -> np.ndarray:
    """(resamples, n): count of each of n units in n draws with replacement."""
    return generator.multinomial(n, np.full(n, 1 / n), _BOOTSTRAPS)
