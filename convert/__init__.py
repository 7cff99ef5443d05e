"""Trained weights between PyTorch and MLX, both ways, byte for byte. Imports no MLX."""
