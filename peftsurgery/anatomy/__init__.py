"""Anatomy: sites and their roles, found by the dataflow of a graph."""

from peftsurgery.anatomy.analysis import Anatomy, analyse
from peftsurgery.anatomy.site import Placed, Site, Slice
from peftsurgery.anatomy.survey import survey

__all__ = ["Anatomy", "Placed", "Site", "Slice", "analyse", "survey"]
