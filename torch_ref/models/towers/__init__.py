"""The reference's vision encoders."""
