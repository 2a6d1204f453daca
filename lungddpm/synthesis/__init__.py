"""From references and layouts to a synthetic cohort: what is made, by whom, and with what provenance."""
