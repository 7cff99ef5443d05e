"""One file for each family: its tower run, and how mlx-vlm takes the visual tokens back.

`see` gives the pictures of each image, `project` embeddings, `mark` the placeholder's id, `left`
the rows of the prompt that stay, and `hand_over` the embeddings as mlx-vlm wants them.
"""
