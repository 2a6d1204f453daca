"""What people look at: the report page, pages of layouts, figures, the viewer."""
