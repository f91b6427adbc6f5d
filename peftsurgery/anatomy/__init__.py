"""Anatomy: what the graph means. Sites and their roles, found by what the graph does with values."""

from .analysis import Anatomy, analyse
from .site import Placed, Site, Slice
from .survey import Survey, survey

__all__ = ["Anatomy", "Placed", "Site", "Slice", "Survey", "analyse", "survey"]
