"""Measurements. Tests never assert a time; these print what they see."""

import mlx_vlm_prune  # noqa: F401 - its BLAS comes before any module here imports mlx
