"""What of each awkward network can go, and why the rest stays, as a table.

    python -m examples.benchmarks.awkward_table --out examples/results/awkward.md

The share is measured: that of the parameters which lie in tensors that a cut may reach while staying exact. The words
beside it are those of the tests, which hold the measured share to the one expected there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples.benchmarks.awkward import MODELS
from examples.benchmarks.awkward_parts.prunable import PRUNABLE
from examples.benchmarks.zoo_parts.backends import prunable_share
from lightning_prune import trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        f"# {len(MODELS)} awkward networks",
        "",
        (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
        "",
        "Made by `python -m examples.benchmarks.awkward_table --out examples/results/awkward.md`.",
        "",
        "| network | construct | prunable | stays whole |",
        "|---|---|--:|---|",
        *(row(name) for name in MODELS),
    ]
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


def row(name: str) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    network = MODELS[name].build()
    graph = trace(network, MODELS[name].inputs())
    share = prunable_share(network, graph)
    cells = (f"`{name}`", MODELS[name].note, f"{share:.0%}", PRUNABLE[name][1])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
