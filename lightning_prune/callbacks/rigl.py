"""The rigged lottery: sparse training that grows weights where the gradient is largest."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.sparse_training import SET


class RigL(SET):
    """The rigged lottery: like :class:`SET`, but weights grow where the gradient is largest (Evci et al., 2020).

    The gradient of all weights is taken between two steps, summed over ``batches`` batches of the training data, and
    not on the batch that comes next. A weight that is dropped and grown in the same update just stays.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[RigL(remove=0.9)], logger=False)
    """

    batches = 4

    @override
    def growth(self, network: Network) -> dict[str, Tensor]:
        taken = list(network.probe.gradients(self.batches))
        sums = {name: torch.stack([part[name] for part in taken]).sum(0) for name in network.weights.keep}
        return {name: network.average(total).abs() for name, total in sums.items()}
