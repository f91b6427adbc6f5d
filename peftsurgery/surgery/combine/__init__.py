"""Combine: one adapter made of others."""
