"""Anatomy: what the graph means. Sites and their roles are found by what becomes of values."""

from .analysis import Anatomy, analyse
from .site import Placed, Site, Slice
from .survey import Survey, survey

__all__ = ["Anatomy", "Placed", "Site", "Slice", "Survey", "analyse", "survey"]
