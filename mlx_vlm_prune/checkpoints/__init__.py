"""What a stranger's files are and hold: safe reading, names, families. Nothing here imports mlx."""
