"""Examples that once failed, as the fuzzer printed them."""

from __future__ import annotations

from tests.fuzz.architectures import Architecture, Example, Removal

WRONG = [
    # The layer under the parametrisation went on remembering the old number of inputs.
    Example(
        architecture=Architecture(
            kind="vector",
            channels=3,
            blocks=(("linear", 4, True), ("reparametrised", 4, "spectral norm", 0)),
            head="plain",
            seed=7,
        ),
        removal=Removal(share=0.5, single=None, seed=7),
    ),
    Example(
        architecture=Architecture(
            kind="image",
            channels=4,
            blocks=(("linear", 6, True), ("reparametrised", 8, "spectral norm", 0)),
            head="plain",
            seed=8,
        ),
        removal=Removal(share=0.5, single=0, seed=1),
    ),
    # Two groups share a number that the code keeps once, and only one of them is as wide as the other's partner.
    Example(
        architecture=Architecture(
            kind="sequence",
            channels=1,
            blocks=(("linear", 4, False), ("dense", (("uneven", 6, 2, False), ("multihead", 0)), False)),
            head="classifier",
            seed=0,
        ),
        removal=Removal(share=0.5, single=None, seed=0),
    ),
]
"""Something other than an exact cut or a refusal came of these."""

REFUSED_IN_SHRINK = [
    # What is one unit after the first shuffle is a whole piece of the second, of which two must remain.
    Example(
        architecture=Architecture(
            kind="image",
            channels=1,
            blocks=(("linear", 8, False), ("channel_shuffle", 2), ("activation", "relu"), ("channel_shuffle", 1)),
            head="classifier",
            seed=9,
        ),
        removal=Removal(share=0.1, single=None, seed=0),
    ),
    # Half of seven channels is as much as half of six: a cut of a single one looks as if it could be followed.
    Example(
        architecture=Architecture(
            kind="vector",
            channels=1,
            blocks=(
                ("linear", 8, False),
                ("branches", (), (("einsum", 1, False), ("folded", 0, "inner", "unbind inner", True)), "sub", 8),
                ("sliced", "half", 3),
            ),
            head="several",
            seed=9,
        ),
        removal=Removal(share=0.5, single=None, seed=1),
    ),
    # A magnitude per input channel: switched off through the direction, it is 0 / 0.
    Example(
        architecture=Architecture(
            kind="image",
            channels=2,
            blocks=(("linear", 6, True), ("reparametrised", 8, "weight norm", 1)),
            head="classifier",
            seed=4,
        ),
        removal=Removal(share=0.5, single=None, seed=0),
    ),
    # With a single channel left, einsum takes another way than with several.
    Example(
        architecture=Architecture(
            kind="sequence",
            channels=4,
            blocks=(("linear", 4, False), ("einsum", 8, True)),
            head="classifier",
            seed=6,
        ),
        removal=Removal(share=0.9, single=None, seed=0),
    ),
    Example(
        architecture=Architecture(
            kind="vector",
            channels=1,
            blocks=(("linear", 10, True), ("folded", 4, "inner", "mix inner", False)),
            head="classifier",
            seed=2,
        ),
        removal=Removal(share=0.9, single=None, seed=0),
    ),
    # Half of the channels, computed from their number: the halves can only be cut alike.
    Example(
        architecture=Architecture(
            kind="vector",
            channels=3,
            blocks=(("linear", 8, False), ("sliced", "half", 5), ("linear", 8, True)),
            head="several",
            seed=4,
        ),
        removal=Removal(share=0.9, single=5, seed=7),
    ),
]
"""The trace offered a cut that the shrink then had to refuse."""

LATE = [
    # The second half is read by nobody, and its size is not seen to matter as long as rounding hides it.
    Example(
        architecture=Architecture(
            kind="image",
            channels=2,
            blocks=(
                ("linear", 9, True),
                ("conv_transpose", 11, True, 3),
                ("conv_transpose", 11, True, 2),
                ("sliced", "half", 4),
            ),
            head="classifier",
            seed=4,
        ),
        removal=Removal(share=0.9, single=None, seed=3),
    ),
]
"""A cut that the trace cannot know to be impossible: it must be refused by the shrink."""
