"""From the command line to several processes that train one network together, and back (docs/several-processes.md)."""
