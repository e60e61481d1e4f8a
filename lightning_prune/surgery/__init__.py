"""Resize networks in place, exactly."""

from lightning_prune.surgery.shrink import Shrunk, keep_whole, resized, shrink, trace, trace_programs

__all__ = ["Shrunk", "keep_whole", "resized", "shrink", "trace", "trace_programs"]
