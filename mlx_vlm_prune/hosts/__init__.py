"""Models of other libraries, pruned where they stand: nothing of theirs is copied, none of their
classes is touched, and only `pruned` puts anything on a model, for the length of a block.

Importing this costs nothing; the library is imported when such a model is loaded.
"""
