"""Resize networks in place, exactly."""

from lightning_prune.surgery.shrink import Shrunk, shrink, trace, trace_programs

__all__ = ["Shrunk", "shrink", "trace", "trace_programs"]
