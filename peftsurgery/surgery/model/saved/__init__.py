"""Saved surgeries: how a directory with adapters is written, read and described."""
