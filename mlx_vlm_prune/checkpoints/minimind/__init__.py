"""MiniMind-V's checkpoints: its generations, and the tensors each is known by."""
