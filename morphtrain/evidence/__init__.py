"""Analysis of runs' records, offline: plots and regressions."""
