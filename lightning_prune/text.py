"""Numbers and tables as people read them, in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

COLUMNS = 100
"""Widest line of plain text."""

Units = tuple[tuple[str, float], ...]
COUNTS: Units = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))
BYTES: Units = (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12))
SECONDS: Units = (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0))


def format_count(value: float) -> str:
    """A number of things with at most four figures and a decimal prefix.

    Example:
        >>> format_count(64), format_count(701_466), format_count(1_813_561_344)
        ('64', '701.5 k', '1.814 G')
    """
    return in_units(value, COUNTS, value)


def format_bytes(value: float) -> str:
    """A size in bytes, in decimal units.

    Example:
        >>> format_bytes(812), format_bytes(2_807_100)
        ('812 B', '2.807 MB')
    """
    return in_units(value, BYTES, value)


def format_seconds(value: float) -> str:
    """A duration in seconds.

    Example:
        >>> format_seconds(0.00152), format_seconds(2.5)
        ('1.520 ms', '2.500 s')
    """
    return in_units(value, SECONDS, value)


def in_units(value: float, units: Units, reference: float) -> str:
    """A value written in the unit that suits another one, so that the two can be compared at a glance.

    Args:
        value: What to write, in the base unit.
        units: Names and sizes of the units, from small to large.
        reference: The value whose unit is used: the largest one that is not larger than it.

    Example:
        >>> in_units(460, COUNTS, reference=1210), in_units(460, COUNTS, reference=460)
        ('0.460 k', '460')
    """
    name, size = max((unit for unit in units if unit[1] <= reference), key=lambda unit: unit[1], default=units[0])
    scaled = value / size
    whole = size == 1.0 and float(value).is_integer()
    decimals = 0 if whole else 3 if scaled < 10 else 2 if scaled < 100 else 1
    return f"{scaled:.{decimals}f} {name}".rstrip()


def removed(before: float, after: float) -> str:
    """The fraction that went, in percent.

    Example:
        >>> removed(16, 6), removed(2.0, 2.2), removed(0, 0)
        ('62.5%', '-10.0%', '-')
    """
    return f"{1 - after / before:.1%}" if before else "-"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    r"""Lines of a table whose first column stands left and whose others stand right.

    Example:
        >>> print("\n".join(aligned([("name", "width"), ("fc", "10")])))
        name  width
        fc       10
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return lines


def shortened(name: str, length: int) -> str:
    """The name with some of its middle left out where it is too long; the end of a module's name tells the most.

    Example:
        >>> shortened("backbone.layer1.conv1", 12)
        'bac…r1.conv1'
    """
    if len(name) <= length:
        return name
    head = (length - 1) // 3
    return f"{name[:head]}…{name[head + 1 - length :]}"


def listed(names: Sequence[str], length: int) -> str:
    """Names side by side; those for which there is no room are only counted, but for the first.

    Example:
        >>> listed(["conv1", "conv2", "conv3"], 30), listed(["conv1", "conv2", "conv3"], 18)
        ('conv1, conv2, conv3', 'conv1 and 2 more')
    """
    if len(text := ", ".join(names)) <= length:
        return text
    for count in range(len(names) - 1, 0, -1):
        if len(text := f"{', '.join(names[:count])} and {len(names) - count} more") <= length:
            return text
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return shortened(names[0], length - len(more)) + more


def wrapped(text: str) -> str:
    """One indented paragraph of a list, with a hanging indent where it is longer than a line."""
    return textwrap.fill(text, COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
