"""The independent PyTorch reference: the same parts by the same names, written from the formulas."""
