"""From scans to cases: lungs, vessels and nodules segmented, checked, and put on the model grid."""
