"""The reference's language models, which take embeddings with explicit positions."""
