"""What stands above the answers."""

import pandas as pd

from lungddpm.verdict.calibration import COLUMNS as CALIBRATION_COLUMNS
from lungddpm.verdict.calibration import FAILED, LUNGS_ALONE, SPREAD
from lungddpm.verdict.notes import notes_table
from lungddpm.verdict.power import RunPower

NOTHING = pd.DataFrame(columns=CALIBRATION_COLUMNS)


def test_a_run_without_anything_unusual_has_no_note():
    assert notes_table([], RunPower("This run shows a true gain of about 0.1 Dice.", False), NOTHING).empty


def test_copies_come_before_calibration():
    failed = pd.DataFrame([("g", LUNGS_ALONE, SPREAD, 4, 1.1001, 0.1, 0.9, 1.1, FAILED)], columns=CALIBRATION_COLUMNS)
    notes = notes_table([["real, fold0_seed0", "real, fold0_seed1"]], RunPower("Too small.", True), failed)
    assert notes["about"].tolist() == ["copied replicates", "size of the run", "HU calibration"]
    assert "real, fold0_seed0; real, fold0_seed1" in notes["note"][0]
    assert "spread 1.1001 times as wide" in notes["note"][2]
