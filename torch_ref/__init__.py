"""The independent PyTorch reference: the same parts by the same names, from the formulas."""
