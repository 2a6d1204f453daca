"""The configuration: its models, loading, and its reference page."""
