"""From references and layouts to a synthetic cohort: planning, sampling and provenance."""
