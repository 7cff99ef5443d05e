"""lmms-eval's model `mlx_vlm_prune`: its tasks' messages and options, and answers in batches.

`manifest.py` is the entry point, `model.py` has the classes; they alone import lmms-eval.
docs/evaluation.md says how it is used.
"""
