"""A run as a whole: start, plan, estimate, benchmark and verify it, and check the machine."""
