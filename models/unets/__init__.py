"""UNets."""
