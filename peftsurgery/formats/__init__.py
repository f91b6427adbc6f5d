"""Formats: other tools' files, as thin translations of names and layouts."""
