"""A checkpoint that mlx-vlm alone runs pruned: the code that is written into it, and the writing.

`parts`, `features`, `projected`, `shorter`, `mrope`, `ahead` and `families` are ordinary modules,
checked and tested as such; `source` makes one file of those that a model and a method need, and
`folder` the checkpoint around it. Where a method needs more of the tower than these see, the file
is `leaning`, which imports this package.
"""
