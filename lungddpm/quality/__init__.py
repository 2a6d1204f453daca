"""Quality of synthetic CT: errors by region, feature distances, diversity, nearness to training cases, calibration,
label fidelity."""
