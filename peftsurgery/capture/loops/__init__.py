"""Loops over time steps: kept as loops, so that the number of steps may vary."""
