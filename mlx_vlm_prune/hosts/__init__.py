"""Pruning inside other libraries' models (mlx-vlm's).

Nothing of theirs is copied, none of their classes is touched, and only `attach` puts anything on
a model, which `detach` takes off again.

Importing this costs nothing; the library is imported when such a model is loaded.
"""
