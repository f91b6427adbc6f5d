"""Checkpoints: models as files, changed without being built (no torch and no transformers here)."""
