"""The verdict: measures of every arm, the statistics of their comparison, tables, figures, and the report."""
