"""What a run of this size can show, said before what it did show."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lungddpm.core.text import plural
from lungddpm.verdict.statistics import POWER


@dataclass(frozen=True)
class RunPower:
    """Which true gain a run can show."""

    sentence: str
    """Empty where no arm was compared."""
    too_small: bool
    """Whether it can show none: a reader must know before the answers."""


def run_power(rows: pd.DataFrame, prose: str, published: float) -> RunPower:
    """The smallest gain that a run can show, beside the published one.

    Args:
        rows: of `verdict.csv`, the decisive measure of the arms with synthetic CT.
        prose: name of the measure, which lies between 0 and 1.
        published: the published gain.
    """
    rows = rows[rows["difference"].notna()]
    if rows.empty:
        return RunPower("", False)
    decided = rows[rows["detectable_difference"] > 0]
    if decided.empty:
        return RunPower(f"This run cannot tell whether synthetic CT helps: {_why_not(rows)}.", True)
    best = decided.loc[decided["detectable_difference"].idxmin()]
    gain, room = best["detectable_difference"], 1 - best["baseline_mean"]
    size = f"about {gain:.2g} {prose} ({best['detectable_low']:.2g} to {best['detectable_high']:.2g})"
    if gain > room:
        text = (
            f"This run is too small to show a gain: it would have to be {size}, and above real there is room for "
            f"{room:.2f} only."
        )
        return RunPower(text, True)
    text = f"A run of this size shows a true gain of {size} or more with a probability of {100 * POWER:.0f} %; "
    if gain > published:
        return RunPower(
            text + f"a gain as small as the published one, {published:.3f}, would mostly stay hidden.", False
        )
    return RunPower(text + f"the published gain is {published:.3f}.", False)


def _why_not(rows: pd.DataFrame) -> str:
    if not rows["run_df"].any():
        return "with one replicate, how much training runs scatter is not known"
    if rows["standard_error"].eq(0).all():
        return "every case scored the same in all arms"
    return f"{plural(int(rows['n_cases'].max()), 'test case')} are too few"
