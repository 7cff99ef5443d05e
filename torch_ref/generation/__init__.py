"""The reference's decoding that is more than one step after another."""
