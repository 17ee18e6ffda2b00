"""Growing a network while it trains: one module an option of the `grow` group."""
