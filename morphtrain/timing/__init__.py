"""Timing of epochs: the clock, whether a run has its device and cores to itself, and how fast they are meanwhile."""
