"""Untrusted files, checked as they are read; our own, written whole or not at all."""
