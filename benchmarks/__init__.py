"""Measurements. Tests never assert a time; these print what they see."""

from mlx_vlm_prune import fast_blas

fast_blas.load()  # before any module here imports mlx
