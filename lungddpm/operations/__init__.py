"""About a run as a whole: start it, plan it, estimate and time it, verify it, check the machine."""
