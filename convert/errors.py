"""The one kind of error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """One sentence: what is wrong, where, and what is allowed."""
