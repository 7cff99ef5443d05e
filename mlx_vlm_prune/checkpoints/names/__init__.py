"""Tensor names and the order of their values, published and ours, both ways."""
