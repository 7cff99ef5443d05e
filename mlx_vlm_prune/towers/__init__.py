"""Vision encoders. Each returns its features, and the signals a pruner asked for."""

from .clip import CLIPConfig, CLIPTower

__all__ = ["CLIPConfig", "CLIPTower"]
