"""The reference's models: tower, projector, splicing, decoder, language models."""
