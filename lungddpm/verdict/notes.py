"""What a reader has to know before the answers: above them on the page, and in the terminal.

What the run is able to show is always there. A warning is there only if it may change what the reader makes of the
answers; the rest is under the page's limits.
"""

from __future__ import annotations

import pandas as pd

from lungddpm.evaluation.measures import deciding_measure
from lungddpm.quality.calibration import calibration_notes
from lungddpm.verdict.power import RunPower
from lungddpm.verdict.run_spread import spread_notes

COLUMNS = ["about", "warning", "note"]


def notes_table(
    copies: list[list[str]], power: RunPower, calibration: pd.DataFrame, run_spread: pd.DataFrame, significance: float
) -> pd.DataFrame:
    """The notes of a run, warnings first, the gravest before the others; most runs should have none of these.

    Args:
        copies: groups of replicates that are the same, each as "arm, replicate".
        power: which gain the run can show.
        calibration: rows of `calibration.csv`.
        run_spread: rows of `run_spread.csv`.
        significance: p below it is beyond chance.

    Returns:
        `COLUMNS`: what the note is about, whether it is a warning, and one or a few sentences.
    """
    warnings = {
        "copied replicates": copy_notes(copies),
        "size of the run": [power.sentence] if power.too_small else [],
        "HU calibration": calibration_notes(calibration),
        "spread of training runs": spread_notes(run_spread, deciding_measure().title, significance),
    }
    rows = [(about, True, note) for about, of_kind in warnings.items() for note in of_kind]
    if power.sentence and not power.too_small:
        rows.append(("size of the run", False, power.sentence))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"warning": bool})


def copy_notes(copies: list[list[str]]) -> list[str]:
    """A sentence for each group of replicates that are the same."""
    return [
        f"The same measures in every case: {'; '.join(names)}. Trainings that differ do not end so: look for a copied "
        "folder. No answer below is to be trusted until it is replaced."
        for names in copies
    ]
