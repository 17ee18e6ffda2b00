"""Learning-rate schedules: one module an option of the `schedule` group, which builds a `Schedule`."""
