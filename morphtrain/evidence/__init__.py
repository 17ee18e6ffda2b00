"""Records of runs, read offline: pictures, and later regressions, tests and the report."""
