"""LLaVA-style checkpoints: which release it is, its tensors' names, and how they become ours."""
