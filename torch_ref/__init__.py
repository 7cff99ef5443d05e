"""The independent PyTorch reference: the same parts by the same names, from the formulas."""

from mlx_vlm_prune.checkpoints import startup  # noqa: F401 - from here on Ctrl-C ends quietly
