"""The configuration: its models, how it is read, and its reference page."""
