"""Exports read by the programs that they are for, and compared with the folded model."""
