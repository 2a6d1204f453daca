"""Arms: roles, folds, and the training sets to compare."""
