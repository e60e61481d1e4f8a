"""What is executed in place of torch's own functions must compute the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_prune.graph.one_way import _einsum, _linear

EQUATIONS = {
    "bc,oc->bo": [(2, 3), (4, 3)],
    "b n c, b m c -> b n m": [(2, 3, 5), (2, 4, 5)],
    "bgc...,gck->bgk...": [(2, 3, 4, 5, 6), (3, 4, 7)],
    "...d,od->...o": [(2, 3, 4), (5, 4)],
    "...,i->...i": [(2, 3), (4,)],
    "...a,...a->...": [(2, 3, 1), (1, 3, 4)],  # broadcast: torch's own
    "ij,kl->ikjl": [(2, 1), (1, 3)],
    "ij,jk->": [(2, 3), (3, 4)],
    "bmd,dk->bk": [(2, 3, 4), (4, 5)],
    "bmd,d->bmd": [(2, 3, 4), (4,)],
    "aa,ab->b": [(3, 3), (3, 2)],  # a diagonal: torch's own
    "bc,oc": [(2, 3), (4, 3)],  # no arrow: torch's own
    "benh,ehc,be->bnc": [(2, 4, 5, 6), (4, 6, 7), (2, 4)],
    "ab,bc,cd,de->ea": [(2, 3), (3, 1), (1, 4), (4, 2)],
}


@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS.items(), ids=str)
def test_einsum(equation, shapes) -> None:
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(_einsum(equation, *operands), torch.einsum(equation, *operands))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (2, 1, 4, 3)])
@pytest.mark.parametrize("bias", [None, torch.randn(4, dtype=torch.float64)], ids=["", "bias"])
def test_linear(shape, bias) -> None:
    data, weight = torch.randn(shape, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(_linear(data, weight, bias), F.linear(data, weight, bias))
