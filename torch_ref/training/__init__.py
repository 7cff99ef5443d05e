"""Training of the scenes model and of learned pruners."""
