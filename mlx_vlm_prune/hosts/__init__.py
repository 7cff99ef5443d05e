"""Models of other libraries, pruned where they stand: nothing of theirs is copied or patched.

Importing this costs nothing; the library is imported when such a model is loaded.
"""
