"""The evolutionary search of layer ratios: against every network there is, and without a trace when it fails."""

from __future__ import annotations

import copy
import re

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ConfigurationError, EvolutionarySearch, OneShot, PruneError, trace
from tests.fits import equal, fit, pruning, small_net, trainer
from tests.helpers import masked_copy

WIDTH = 8
INPUTS = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
LABELS = (INPUTS[:, 0] * INPUTS[:, 1] > 0).long() + (INPUTS[:, 2] > 0).long()
DATA = TensorDataset(INPUTS, LABELS)


class Perceptron(L.LightningModule):
    """Two hidden layers that are never trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(
            nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)
        )
        with torch.no_grad():
            self.net[4].weight.mul_(8)

    def training_step(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def losses_of_all():
    """Loss of every network with half of the units, the largest of each layer, by widths."""
    model = Perceptron()
    graph = trace(model.net, INPUTS)
    largest = {name: model.net[int(name)].weight.abs().sum(1).argsort(descending=True) for name in graph.groups}
    found = {}
    for width in range(1, WIDTH):
        masked = masked_copy(model.net, graph, {"0": largest["0"][:width], "2": largest["2"][: WIDTH - width]})
        with torch.no_grad():
            found[width, WIDTH - width] = float(cross_entropy(masked(INPUTS), LABELS))
    return found


def pruned_by(callback):
    module = Perceptron()
    trainer(callback, epochs=1).fit(module, DataLoader(DATA, batch_size=64))
    return (module.net[0].out_features, module.net[2].out_features), float(
        cross_entropy(module.net(INPUTS), LABELS).detach()
    )


def test_it_finds_the_best_of_all_networks():
    losses = losses_of_all()
    best = min(losses, key=losses.get)
    search = EvolutionarySearch(0.5, "channels", "l1", population=8, generations=5, batches=1, at=0, unit="step")
    widths, loss = pruned_by(search)
    assert widths == best
    assert loss == pytest.approx(losses[best], rel=1e-5)
    alone, _ = pruned_by(pruning(remove=0.5, of="channels", criterion="l1", schedule=OneShot(0, "step")))
    assert losses[best] < min(losses[alone], losses[WIDTH // 2, WIDTH // 2])
    note = next(note for note in search.report.notes if "search" in note)
    tried = int(re.search(r"loss of (\d+) networks, which took [\d.]+ seconds", note).group(1))
    assert 2 <= tried <= len(losses)


def test_every_genome_meets_the_budget():
    kept = []

    class Watching(EvolutionarySearch):
        def _selection(self, network, scores, level):
            keep = super()._selection(network, scores, level)
            if level == 1.0 and "eligible" in self._record:
                kept.append(keep)
            return keep

    search = Watching(0.5, "channels", population=6, generations=2, batches=1, at=1, unit="epoch")
    fit(search)
    assert len(kept) > 10
    widths = [tuple(int(mask.sum()) for mask in keep.values()) for keep in kept]
    assert all(abs(sum(found) - 60 * 0.5) <= 1 for found in widths)
    assert len(set(widths)) > 4


def test_it_is_the_same_for_the_same_seed():
    def widths(seed):
        search = EvolutionarySearch(0.5, population=4, generations=2, batches=1, at=0, unit="step", seed=seed)
        fit(search, epochs=1)
        return search.report.groups

    assert widths(1) == widths(1)


def test_a_step_without_a_loss_is_an_error_and_nothing_changes():
    class Lossless(type(small_net())):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    module = small_net()
    module.__class__ = Lossless
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(PruneError, match="training_step of Lossless gave no loss"):
        fit(EvolutionarySearch(population=2, generations=1, at=0, unit="step"), module=module)
    assert equal(module.state_dict(), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"population": 1}, "population must be at least 2"),
        ({"generations": 0}, "generations must be at least 1"),
        ({"batches": 0}, "at least 1"),
        ({"criterion": "l22"}, "did you mean 'l2'"),
        ({"of": "mac"}, "did you mean 'macs'"),
        ({"remove": 1.0}, "remove"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        EvolutionarySearch(**arguments)
