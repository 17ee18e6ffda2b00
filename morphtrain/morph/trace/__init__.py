"""How channels move through a network: a trace of its calls, and what can be read off it."""
