"""Rewrite: a capture with the cuts of a plan made; it knows graphs, and no model."""
