"""Weights that a base keeps in fewer bits: a codec a file, pure numpy."""
