"""How good synthetic CT is: errors by region, feature distances, diversity, nearness to training cases, calibration,
label fidelity."""
