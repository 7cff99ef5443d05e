"""A family to check the others with; what is written has the model's own in its place."""

from .families.llava import hand_over, left, mark, project, see

__all__ = ["hand_over", "left", "mark", "project", "see"]
