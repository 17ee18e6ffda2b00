"""The clock; whether a run has its device and cores for itself, and how fast they are meanwhile."""
