"""Language models that take embeddings with explicit positions."""
