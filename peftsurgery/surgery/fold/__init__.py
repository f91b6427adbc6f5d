"""Fold: the operations of a model made part of its weights."""
