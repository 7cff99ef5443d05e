"""Measurements. Tests never assert a time; these print what they see."""
