"""Two configs, or a config and code of the user's own, timed in turns in one process: see `__main__`."""
