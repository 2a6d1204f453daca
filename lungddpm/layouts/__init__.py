"""From scans to cases: lungs, vessels and nodules are segmented, checked, and resampled to the model grid."""
