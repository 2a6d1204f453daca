"""From scores to a verdict: statistics, tables, published figures."""
