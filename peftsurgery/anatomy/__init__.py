"""Anatomy: what the graph means. Sites and their roles are found by what becomes of values."""

from peftsurgery.anatomy.analysis import Anatomy, analyse
from peftsurgery.anatomy.site import Placed, Site, Slice
from peftsurgery.anatomy.survey import Survey, survey

__all__ = ["Anatomy", "Placed", "Site", "Slice", "Survey", "analyse", "survey"]
