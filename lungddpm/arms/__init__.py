"""Arms: who trains and who tests, and the training sets that are compared."""
