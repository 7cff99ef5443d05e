"""Language models that take embeddings with explicit positions."""

from .minimind import MiniMind, MiniMindConfig

__all__ = ["MiniMind", "MiniMindConfig"]
