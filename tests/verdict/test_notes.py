"""What stands above the answers."""

import numpy as np
import pandas as pd

from lungddpm.quality.calibration import COLUMNS as CALIBRATION_COLUMNS
from lungddpm.quality.calibration import FAILED, LUNGS_ALONE, SPREAD
from lungddpm.verdict.notes import notes_table
from lungddpm.verdict.power import RunPower
from lungddpm.verdict.run_spread import run_spread_table

NOTHING = pd.DataFrame(columns=CALIBRATION_COLUMNS)
ALIKE = run_spread_table(["real", "a", "b"], np.eye(3), [[0], [1], [2]], seed=1)


def test_a_run_without_anything_unusual_has_no_warning_and_says_what_it_can_show():
    notes = notes_table([], RunPower("A run of this size shows 0.1 Dice.", False), NOTHING, ALIKE, 0.05)
    assert notes.to_numpy().tolist() == [["size of the run", False, "A run of this size shows 0.1 Dice."]]


def test_a_run_without_synthetic_arms_has_no_notes_at_all():
    notes = notes_table([], RunPower("", False), NOTHING, ALIKE, 0.05)
    assert notes.query("warning")["note"].tolist() == notes.query("not warning")["note"].tolist() == []


def test_copies_come_before_calibration_and_calibration_before_spread():
    failed = pd.DataFrame([("g", LUNGS_ALONE, SPREAD, 4, 1.1001, 0.1, 0.9, 1.1, FAILED)], columns=CALIBRATION_COLUMNS)
    spread, power = ALIKE.assign(p=[1, 0.01, 1]), RunPower("Too small.", True)
    notes = notes_table([["real, fold0_seed0", "real, fold0_seed1"]], power, failed, spread, 0.05)
    about = ["copied replicates", "size of the run", "HU calibration", "spread of training runs"]
    assert notes["about"].tolist() == about
    assert notes["warning"].all()
    assert "real, fold0_seed0; real, fold0_seed1" in notes["note"][0]
    assert "spread 1.1001 times as wide" in notes["note"][2]
