"""The pruning callbacks: the base of all, and one file per method."""
