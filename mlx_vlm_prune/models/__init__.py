"""The models that we run: tower, projector, splicing, decoder, language models; their loading."""
