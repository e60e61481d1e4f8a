"""Names in networks of which ``torch.compile`` wraps a part."""

from __future__ import annotations

WRAPPED = "_orig_mod"
"""Name under which ``torch.compile`` keeps the module that it wraps."""


def uncompiled_name(name: str) -> str:
    """The name of a module or tensor as it is without ``torch.compile``.

    Example:
        >>> uncompiled_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != WRAPPED)
