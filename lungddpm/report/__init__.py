"""Output for readers: the report page, layout pages, figures, the slice viewer."""
