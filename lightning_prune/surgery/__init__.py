"""Resize networks in place, exactly."""

from lightning_prune.surgery.shrink import Shrunk, resized, shrink, trace, trace_programs

__all__ = ["Shrunk", "resized", "shrink", "trace", "trace_programs"]
