"""Checkpoints from untrusted files: safe reading, tensor names, families. Nothing imports mlx."""
