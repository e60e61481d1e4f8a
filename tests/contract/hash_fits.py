"""Run by processes that hash differently: a fit with every method, and what came of it, to the file given."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn

from tests.contract.ddp_methods import METHODS
from tests.fits import Residual, SmallNet, loader, trainer


def deep_net():
    """Many layers read the same channels, so that sums over them depend on their order."""
    torch.manual_seed(0)
    module = SmallNet()
    module.net[3] = nn.Sequential(*(Residual(12) for _ in range(4)))
    return module


def main(file):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for row in METHODS:
        pruning, module = row.callback(), deep_net()
        trainer(pruning).fit(module, loader())
        found[row.name] = {"weights": dict(module.state_dict()), "record": pruning._record}
    torch.save(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
