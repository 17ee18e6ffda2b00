"""Learning-rate schedules: one module per option of the `schedule` group, which builds a `Schedule`."""
