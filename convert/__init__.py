"""Trained weights between PyTorch and MLX, both ways, byte for byte. Imports no MLX."""

from mlx_vlm_prune.checkpoints import startup  # noqa: F401 - from here on Ctrl-C ends quietly
