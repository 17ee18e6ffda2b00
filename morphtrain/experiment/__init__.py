"""Experiments: the arms of a question over its seeds, as a sweep of Hydra's. `+experiment=...`, conf/experiment."""
