"""A method to check the others with; what is written has the one asked for in its place."""

from ...pruners.random import prune

__all__ = ["prune"]
