"""Vision encoders. Each returns its features, and the signals a pruner asked for."""
