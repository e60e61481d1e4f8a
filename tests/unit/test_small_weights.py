"""Large weights stay, an optimizer picks small ones, and the loss on the calibration batches is never higher for it."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Annealing,
    ConfigurationError,
    CrossEntropy,
    Genetic,
    Linear,
    OneShot,
    ParticleSwarm,
    PruneError,
    SmallWeightSearch,
    WeightPruning,
)
from lightning_prune.buckets import SmallWeights, quotas
from lightning_prune.callbacks.trial_masks import TrialMasks
from lightning_prune.probe import Probe
from tests.fits import BATCHES, equal, fit, small_net, trainer

TINY = Genetic(population=4, generations=2)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# Buckets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preferences", "count", "sizes", "sent"),
    [
        ([0, 0, 0], 6, [9, 9, 9], [2, 2, 2]),
        ([0, 0, 0], 7, [9, 9, 9], [3, 2, 2]),  # of equal remainders the first gets more
        ([1, 3, 0], 8, [9, 9, 0], [2, 6, 0]),  # in proportion to 1 : 3, written as logarithms below
        ([1, 3, 4], 8, [9, 2, 9], [1, 2, 5]),  # two are all there are, the other six go 1.2 : 4.8
        ([1, 3, 4], 7, [1, 2, 4], [1, 2, 4]),
        ([1, 3, 4], 0, [1, 2, 4], [0, 0, 0]),
        ([1, 1, 98], 9, [5, 9, 1], [4, 4, 1]),
    ],
)
def test_quotas_by_hand(preferences, count, sizes, sent):
    logarithms = numbers(*preferences).clamp(1e-9).log() if any(preferences) else numbers(*preferences)
    assert quotas(logarithms, count, torch.tensor(sizes)).tolist() == sent


def test_quotas_add_up_whatever_the_sizes():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 50, (12,), generator=draw)
        count = int(torch.randint(0, int(sizes.sum()) + 1, (), generator=draw))
        sent = quotas(3 * torch.randn(12, generator=draw), count, sizes)
        assert int(sent.sum()) == count
        assert bool(((sent >= 0) & (sent <= sizes)).all())


def example_sets(fraction=0.5):
    """Two tensors; the first set is the four largest weights, of which 3 and 4 may be exchanged."""
    magnitudes = {"a": numbers(8, 1, 4, 2), "b": numbers(3, 7, 0.5, 0.1)}
    gains = {"a": numbers(0, 6, 1, 2), "b": numbers(-1, 0, 5, 3)}
    first = {name: values >= 3 for name, values in magnitudes.items()}
    return SmallWeights(magnitudes, gains, first, {}, fraction, quantiles=2)


def described(share, tensors=(0, 0), magnitudes=(0, 0), gains=(0, 0)):
    return numbers(share, *tensors, *magnitudes, *gains)


# Those that may be exchanged or come in are a[1], a[2], a[3], b[0], b[2], b[3]. In `a` the lower half by magnitude are
# a[1] and a[3], by gain a[2] and a[3]; in `b` they are b[2] and b[3], and b[0] and b[3].
@pytest.mark.parametrize(
    ("description", "a", "b"),
    [
        (described(0), [0, 2], [0, 1]),
        (described(0.5, gains=(-3, 3)), [0, 1], [1, 2]),  # a[1] and b[2] alone gain much
        (
            described(0.5, tensors=(3, -3), magnitudes=(3, -3)),
            [0, 1, 3],
            [1],
        ),  # b[0] and a[2] are let go for a[1], a[3]
        (described(0.5, tensors=(-3, 3), gains=(3, -3)), [0], [0, 1, 3]),  # b[0] comes back
        (described(0.25, tensors=(-3, 3), gains=(-3, 3)), [0, 2], [1, 2]),  # the smallest of the first set goes alone
    ],
)
def test_sets_by_hand(description, a, b):
    chosen = example_sets().chosen(description)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in chosen.items()} == {"a": a, "b": b}


def test_every_description_keeps_as_many_and_all_of_the_largest():
    sets, draw = example_sets(), torch.Generator().manual_seed(0)
    for _ in range(100):
        point = sets.lower + torch.rand(7, generator=draw, dtype=torch.float64) * (sets.upper - sets.lower)
        chosen = sets.chosen(point)
        assert sum(int(mask.sum()) for mask in chosen.values()) == 4
        assert bool(chosen["a"][0] & chosen["b"][1])


def test_what_is_off_stays_off():
    alive = {"a": torch.tensor([True, False, True, True])}
    first = {"a": torch.tensor([True, False, True, False])}
    sets = SmallWeights({"a": numbers(4, 3, 2, 1)}, {"a": numbers(0, 9, 0, 1)}, first, alive, 0.5, quantiles=1)
    assert sets.chosen(sets.starts[-1])["a"].tolist() == [True, False, False, True]


def test_swaps_by_hand():
    sets = example_sets()
    keep = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([True, True, False, False])}
    gains = {"a": numbers(-9, 6, 1, 2), "b": numbers(-1, -9, 5, 0)}  # a[0] and b[1] are too large to go
    once = sets.swapped(keep, gains, most=1)
    assert [once[name].int().tolist() for name in "ab"] == [[1, 1, 1, 0], [0, 1, 0, 0]]
    twice = sets.swapped(keep, gains, most=5)
    assert [twice[name].int().tolist() for name in "ab"] == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert sets.swapped(twice, gains, most=5) is None


def test_a_swap_that_does_not_pay_is_taken_back():
    sets = example_sets()
    keep = sets.chosen(sets.starts[0])
    gains = {"a": numbers(0, 6, 1, 2), "b": numbers(-1, 0, 5, 3)}
    tried = []

    def loss(masks):
        tried.append(masks)
        return float(masks["b"][2])  # b[2] looks good and is not

    refined = sets.refined(keep, 3, lambda masks: gains, loss, lambda masks: masks)
    assert equal(refined, keep)
    assert len(tried) == 4
    refined = sets.refined(keep, 3, lambda masks: gains, lambda masks: -float(masks["a"][1]), lambda masks: masks)
    assert refined["a"][1]


# The callback --------------------------------------------------------------------------------------------------------


class Witness(L.Callback):
    """Masks and loss right after the round at the start of the second epoch, counted without the probe's help."""

    def __init__(self, pruning, batches):
        self.pruning, self.batches = pruning, batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == BATCHES:
            net = copy.deepcopy(pl_module.net).train()
            data = Probe(trainer, pl_module).batches(self.batches)
            self.loss = sum(float(cross_entropy(net(images), labels)) for images, labels in data) / len(data)
            self.masks = self.pruning._network.weights.state_dict()


def witnessed(method, batches=3, **arguments):
    pruning = method(**{"remove": 0.9, "schedule": OneShot(1, "epoch"), "shrink": "never", **arguments})
    witness = Witness(pruning, batches)
    fit(pruning, witness, epochs=2)
    return witness, pruning


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("kind", [Genetic, ParticleSwarm, Annealing, CrossEntropy, None])
def test_the_calibration_loss_is_never_above_that_of_magnitude_pruning(kind):
    magnitude, _ = witnessed(WeightPruning)
    searched, _ = witnessed(SmallWeightSearch, optimizer=kind and kind(4, 2), batches=3, sweeps=2)
    assert searched.loss < magnitude.loss - 1e-3
    assert kept(searched.masks) == kept(magnitude.masks)


@pytest.mark.parametrize("arguments", [{"small_fraction": 0.0}, {"small_fraction": 0.3}])
def test_without_small_weights_it_is_magnitude_pruning(arguments):
    magnitude, _ = witnessed(WeightPruning)
    searched, _ = witnessed(SmallWeightSearch, optimizer=TINY, batches=1, sweeps=1, **arguments)
    assert equal(searched.masks, magnitude.masks) == (arguments["small_fraction"] == 0)
    common = sum(int((searched.masks[name] & mask).sum()) for name, mask in magnitude.masks.items())
    assert common >= 0.7 * kept(magnitude.masks) - 1


@pytest.mark.parametrize("scope", ["layer", "erk"])
def test_scopes_and_floors_hold_for_what_is_picked(scope):
    arguments = {"scope": scope, "floor": 0.05}
    magnitude, _ = witnessed(WeightPruning, **arguments)
    searched, _ = witnessed(SmallWeightSearch, optimizer=TINY, batches=2, sweeps=2, **arguments)
    counts = [{name: int(mask.sum()) for name, mask in found.masks.items()} for found in (searched, magnitude)]
    assert counts[0] == counts[1]
    assert not equal(searched.masks, magnitude.masks)


def test_a_ladder_of_sparsities_ends_at_the_exact_number():
    pruning = SmallWeightSearch(
        remove=0.95, schedule=Linear(1, 2, 0.5, "epoch"), optimizer=TINY, batches=1, sweeps=1, shrink="never"
    )
    module, _ = fit(pruning)
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight != 0).sum()) for weight in weights) == round(0.05 * total)
    assert len(pruning.report.history) == 3


class Deceptive(L.LightningModule):
    """The first four inputs are small and say nothing but have large weights; the others are large and say it all."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0] * 4 + [0.1] * 4, [1.1] * 4 + [-0.1] * 4]))

    def training_step(self, batch):
        return cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_small_weights_that_matter_are_found():
    labels = torch.arange(32) % 2
    informative = (1.0 - 2 * labels)[:, None] * torch.tensor([1.0, 1.0, 1.0, 40.0])
    data = TensorDataset(torch.cat([torch.zeros(32, 4), informative], 1), labels)
    pruning = SmallWeightSearch(0.75, 0.5, TINY, batches=2, schedule=OneShot(0, "step"), shrink="never", floor=1)
    module = Deceptive()
    trainer(pruning, epochs=1).fit(module, DataLoader(data, 8))
    on = {tuple(entry) for entry in (module.layer.weight != 0).nonzero().tolist()}
    assert len(on) == 4
    assert {(0, 7), (1, 7)} < on


class AtStart(L.Callback):
    def __init__(self, action):
        self.action = action

    def on_train_start(self, trainer, pl_module):
        self.action(trainer, pl_module)


class Regression(L.LightningModule):
    """Loss (w x - y)^2; with manual optimization two backward passes of half of it."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 3.0)

    def training_step(self, batch):
        loss = ((self.layer(batch[0]) - batch[1]) ** 2).mean()
        if self.automatic_optimization:
            return {"loss": loss}
        self.manual_backward(loss / 2, retain_graph=True)
        return self.manual_backward(loss / 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("manual", [False, True])
def test_the_probe_gives_the_mean_loss_of_batches(manual):
    found = []

    def action(trainer, module):
        batches = [
            (numbers(2.0)[None].float(), numbers(5.0)[None].float()),
            (torch.zeros(1, 1), torch.full((1, 1), 3.0)),
        ]
        found.append(Probe(trainer, module).loss(batches))  # ((6 - 5)^2 + (0 - 3)^2) / 2
        assert module.layer.weight.grad is None

    data = DataLoader(TensorDataset(torch.ones(2, 1), torch.ones(2, 1)))
    trainer(AtStart(action), epochs=1).fit(Regression(manual), data)
    assert found == [5.0]


def test_a_step_without_a_loss_is_named():
    class Lossless(Regression):
        def training_step(self, batch):
            return None

    def action(trainer, module):
        with pytest.raises(PruneError, match="training_step of Lossless gave no loss"):
            Probe(trainer, module).loss(Probe(trainer, module).batches(1))

    trainer(AtStart(action), epochs=1).fit(Lossless(), DataLoader(TensorDataset(torch.ones(2, 1), torch.ones(2, 1))))


def test_gains_by_hand_and_weights_as_before():
    class Trying(WeightPruning):
        def carry_out(self, network, level):
            trial, on = TrialMasks(network, 2), torch.ones(1, 1, dtype=torch.bool)
            self.found = [float(trial.gains({"layer.weight": mask})["layer.weight"]) for mask in (on, ~on)]
            self.losses = [trial.loss({"layer.weight": mask}) for mask in (on, ~on)]
            self.weight = float(network.tensors["layer.weight"])
            network.weights.set({"layer.weight": on}, network.tensors)

    # With x = 1: loss (w - y)^2, gradient 2 (w - y). At w = 3, y = 2 and 4: gradients 2 and -2, at w = 0 -4 and -8.
    data = TensorDataset(torch.ones(2, 1), torch.tensor([[2.0], [4.0]]))
    trying = Trying(remove=0.0, schedule=OneShot(0, "step"), shrink="never", floor=0)
    trainer(trying, epochs=1).fit(Regression(), DataLoader(data))
    on, off = 0 + 0.5 * 4 * 9, 3 * 6 - 0.5 * 40 * 9
    assert trying.found == pytest.approx([on, off])
    assert trying.losses == pytest.approx([1.0, 10.0])
    assert trying.weight == 3.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizer": "genetics"}, "did you mean 'genetic'"),
        ({"small_fraction": 1.5}, "small_fraction must lie in"),
        ({"batches": 0}, "At least 1 batch"),
        ({"sweeps": -1}, "and 0 sweeps are needed"),
        ({"scope": "globl"}, "did you mean 'global'"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        SmallWeightSearch(**arguments)


def test_gradients_that_are_no_numbers_are_an_error_and_nothing_changes():
    module = small_net()
    before = copy.deepcopy(module.state_dict())

    class Broken(type(module)):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    module.__class__ = Broken
    with pytest.raises(PruneError, match=r"gradients of .* are NaN or infinite"):
        fit(SmallWeightSearch(schedule=OneShot(0, "step"), batches=1), module=module)
    assert equal(module.state_dict(), before)
