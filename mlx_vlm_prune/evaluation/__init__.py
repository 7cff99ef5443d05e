"""The parts of an evaluation: answers, what they are worth, how sure that is, what is kept.

`mlx_vlm_prune.evaluate` is the command that puts them together.
"""
