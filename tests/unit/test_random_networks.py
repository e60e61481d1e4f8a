"""Subnetworks of random networks: what a step does, and that no weight is ever trained."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import ConfigurationError, EdgePopup, ProbMask, SparseBinaryMask, Supermask, WeightPruning
from lightning_prune.callbacks.random_network import RandomNetwork
from lightning_prune.normalised_sgd import NormalisedSGD
from tests.fits import BATCHES, equal, fit, loader, small_net, trainer

METHODS = [
    EdgePopup,
    SparseBinaryMask,
    lambda **rest: SparseBinaryMask(forward="binary", optimizer="lion", lr=0.01, **rest),
    lambda **rest: SparseBinaryMask(optimizer="sgd", lr=10.0, **rest),
    Supermask,
    ProbMask,
]


class Recording(L.Callback):
    """What the parameters hold while batches are trained on, and in validation."""

    def __init__(self):
        self.training, self.validation = [], []

    def values(self, module):
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_before_backward(self, trainer, pl_module, loss):
        self.training.append(self.values(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.validation.append(self.values(pl_module))


class Linear(L.LightningModule):
    """One linear layer whose loss is a fixed product with its output, so that its gradient is known."""

    def __init__(self, optimizer=torch.optim.SGD):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) * torch.tensor([[1.0, -2.0]])).sum()

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=1.0)


BATCH = torch.tensor([[1.0, 2.0, -1.0]])
SLOPE = torch.tensor([[1.0, 2.0, -1.0], [-2.0, -4.0, 2.0]])
"""Derivative of that loss with respect to the weight."""


def batches(count):
    return DataLoader(BATCH.expand(count, -1))


def one_step(callback, steps=1):
    """The scores before and after so many steps on the linear layer, with the weights that were drawn."""
    found = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.setdefault("before", callback.learnt["scores"]["layer.weight"].clone())
            found["dense"] = callback.learnt["dense"]["layer.weight"].clone()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found["after"] = callback.learnt["scores"]["layer.weight"].clone()

    module = Linear()
    trainer(callback, Look(), max_epochs=1, max_steps=steps).fit(module, batches(steps))
    return found


def test_the_gradient_of_edge_popup_goes_through_the_absolute_value():
    callback = EdgePopup(lr=0.1, weight_decay=0.0, momentum=0.0)
    seen = one_step(callback)
    scores = seen["before"].clone().requires_grad_()
    # Straight through: the mask is what it is forward, and its argument backward.
    ranked = scores.abs()
    mask = (ranked >= ranked.flatten().kthvalue(4).values).float() + ranked - ranked.detach()
    layer = (seen["dense"] * mask) @ BATCH[0]
    (layer * torch.tensor([1.0, -2.0])).sum().backward()
    assert torch.allclose(seen["before"] - seen["after"], 0.1 * scores.grad, atol=1e-6)
    assert torch.allclose(scores.grad, SLOPE * seen["dense"] * seen["before"].sign())


def test_sparse_binary_masks_follow_the_signed_gradient_of_every_weight():
    seen = one_step(SparseBinaryMask(optimizer="sgd", lr=2.0, momentum=0.0))
    # At first all masks are 1/2, whose second moment is half that of binary ones.
    assert torch.equal(seen["before"], torch.zeros(2, 3))
    assert torch.allclose(seen["after"], -2.0 * SLOPE * seen["dense"] * 2**0.5, rtol=1e-5)


def test_masks_are_not_scaled_if_that_is_not_wanted():
    seen = one_step(SparseBinaryMask(optimizer="sgd", lr=2.0, momentum=0.0, variance_match=False))
    assert torch.allclose(seen["after"], -2.0 * SLOPE * seen["dense"], rtol=1e-5)


def test_supermasks_follow_the_slope_of_the_probability():
    seen = one_step(Supermask(lr=0.5, momentum=0.0, remove=0.25))
    assert torch.allclose(torch.sigmoid(seen["before"]), torch.full((2, 3), 0.75))
    assert torch.allclose(seen["before"] - seen["after"], 0.5 * SLOPE * seen["dense"] * 0.75 * 0.25, rtol=1e-5)


def test_probabilities_stay_on_the_budget():
    seen = one_step(ProbMask(budget=(0.0, 0.5), optimizer="sgd", lr=0.3), steps=4)
    assert seen["after"].min() >= 0
    assert seen["after"].max() <= 1
    assert float(seen["after"].sum()) == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_is_trained_and_the_rest_is_frozen(method):
    seen = Recording()
    callback = method(remove=0.5, shrink="never")
    module = small_net()
    norms = {name: p.detach().clone() for name, p in module.named_parameters() if "net.1" in name}
    trainer(callback, seen).fit(module, loader(), loader(2, seed=7))
    final = seen.values(module)
    masked = callback._record["weights"].keys()
    assert masked == {name for name, p in module.named_parameters() if p.dim() > 1}
    for name, value in final.items():
        if name in masked:
            drawn = value[value != 0]
            shown = [step[name][value != 0] for step in seen.validation]
            assert all(bool(((s == 0) | (s == drawn)).all()) for s in shown), name
        elif name in norms:
            assert torch.equal(value, norms[name])
    assert torch.count_nonzero(module.net[9].bias) == 0


@pytest.mark.parametrize("method", METHODS)
def test_what_is_validated_and_saved_is_the_sparse_network(method, tmp_path):
    seen = Recording()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(method(remove=0.75, scope="layer"), seen, saved, enable_checkpointing=True).fit(
        small_net(), loader(), loader(2, seed=7)
    )
    states = [torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.glob("epoch*.ckpt")]
    assert len(states) == 3
    for values in (*seen.validation, *states):
        weights = [value for value in values.values() if value.dim() > 1]
        assert all(int((w != 0).sum()) == round(0.25 * w.numel()) for w in weights)


def test_the_annealed_mask_is_soft_first_and_binary_at_last():
    seen = Recording()
    callback = SparseBinaryMask(remove=0.5, anneal=0.5, shrink="never")
    trainer(callback, seen).fit(small_net(), loader())
    first, last = seen.training[0]["net.4.weight"], seen.training[-1]["net.4.weight"]
    assert torch.count_nonzero(first) == first.numel()
    assert torch.count_nonzero(last) == last.numel() // 2


def test_gradients_that_accumulate_belong_to_one_mask():
    seen = Recording()
    trainer(Supermask(remove=0.5), seen, accumulate_grad_batches=2).fit(small_net(), loader())
    pairs = zip(seen.training[::2], seen.training[1::2], strict=True)
    assert all(equal(first, second) for first, second in pairs)
    assert not equal(seen.training[0], seen.training[2])


@pytest.mark.parametrize("init", ["kaiming_normal", "kaiming_uniform", "signed_constant"])
def test_weights_are_drawn_from_the_law_that_was_asked_for(init):
    seen = one_step(EdgePopup(init=init))
    module = Linear()
    module.layer = nn.Linear(400, 300)
    found = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.update({k: v.clone() for k, v in callback.learnt["dense"].items()})

    module.training_step = lambda batch, batch_idx: module.layer(batch).sum()
    callback = EdgePopup(init=init)
    trainer(callback, Look(), max_epochs=1).fit(module, DataLoader(torch.randn(1, 400)))
    weight = found["layer.weight"]
    assert float(weight.std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert len(weight.abs().unique()) == 1 or init != "signed_constant"
    assert float(weight.abs().max()) <= (6 / 400) ** 0.5 + 1e-6 or init == "kaiming_normal"
    assert seen["dense"].shape == (2, 3)


def test_the_module_s_own_weights_can_be_kept():
    module = small_net()
    before = module.net[4].weight.detach().clone()
    fit(EdgePopup(init="keep", shrink="never"), module=module, epochs=1)
    weight = module.net[4].weight.detach()
    assert torch.equal(weight[weight != 0], before[weight != 0])


def test_a_fit_that_stops_early_ends_with_the_sparse_network():
    class Constant(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.callback_metrics["constant"] = torch.tensor(1.0)

    callback = SparseBinaryMask(remove=0.5)
    stop = EarlyStopping("constant", patience=1, check_on_train_epoch_end=True)
    used = trainer(callback, Constant(), stop, max_epochs=20)
    module = small_net()
    used.fit(module, loader())
    assert used.global_step < 20 * BATCHES
    assert callback.report.reached >= 0.5
    assert int((module.net[0].weight != 0).sum()) == round(0.5 * module.net[0].weight.numel())


def test_an_optimizer_that_needs_gradients_is_refused():
    with pytest.raises(ConfigurationError, match="LBFGS"):
        trainer(EdgePopup()).fit(Linear(torch.optim.LBFGS), batches(1))


def test_a_fit_without_an_end_is_refused():
    with pytest.raises(ConfigurationError, match="no set end"):
        trainer(SparseBinaryMask(), max_epochs=-1).fit(Linear(), batches(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "normal"}, "unknown init"),
        ({"optimizer": "adamw"}, "unknown optimizer of the scores 'adamw'"),
        ({"scope": "tensor"}, "unknown scope"),
        ({"shrink": "rounds"}, "unknown shrink"),
        ({"lr": 0.0}, "lr must be a finite number above 0"),
        ({"temperature": (0.1, 0.5)}, "temperature must fall"),
        ({"anneal": 0.0}, "anneal is a share"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        SparseBinaryMask(**arguments)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (ProbMask, {"temperature": 0.5}, r"temperature must fall .* as in \(1.0, 0.03\), but is 0.5"),
        (ProbMask, {"budget": 0.5}, "budget must be two shares .* but is 0.5"),
        (Supermask, {"lr": "0.1"}, "lr must be a finite number above 0, but is '0.1'"),
        (Supermask, {"lr": float("inf")}, "lr must be a finite number above 0, but is inf"),
        (EdgePopup, {"floor": "1"}, "floor must be a finite number of at least 0, but is '1'"),
        (WeightPruning, {"floor": "1"}, "floor must be a finite number of at least 0, but is '1'"),
        (EdgePopup, {"momentum": "0.9"}, "momentum must be a finite number of at least 0, but is '0.9'"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_by_name(method, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        method(**arguments)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="unknown parameter in exclude 'head'"):
        fit(EdgePopup(exclude=["head"]), epochs=1)


def test_all_methods_derive_from_one_base():
    assert all(isinstance(method(), RandomNetwork) for method in METHODS)


def test_normalised_sgd_by_hand():
    """Two steps on two tensors, one with gradients a hundred times as large."""
    small, large = torch.zeros(2), torch.zeros(2)
    optimizer = NormalisedSGD([small, large], lr=0.1, momentum=0.5, beta=0.75)
    for gradient in ([1.0, -7.0], [3.0, 1.0]):
        small.grad = torch.tensor(gradient)
        large.grad = 100 * small.grad
        optimizer.step()
    # The mean squares are 25 and 5. Corrected for their start: 25, then (0.1875 * 25 + 0.25 * 5) / 0.4375.
    first = torch.tensor([1.0, -7.0]) / 5
    second = 0.5 * first + torch.tensor([3.0, 1.0]) / (5.9375 / 0.4375) ** 0.5
    torch.testing.assert_close(small, -0.1 * (first + second))
    torch.testing.assert_close(large, small)


def test_normalised_sgd_decays_and_leaves_what_has_no_gradient():
    moved, left, still = torch.ones(2), torch.ones(2), torch.ones(2)
    optimizer = NormalisedSGD([moved, left, still], lr=0.1, momentum=0.0, weight_decay=0.5)
    moved.grad, still.grad = torch.tensor([2.0, -2.0]), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(moved, torch.tensor([1 - 0.1 * 1.5, 1 - 0.1 * -0.5]))
    torch.testing.assert_close(still, torch.full((2,), 0.95))
    assert torch.equal(left, torch.ones(2))


def test_tensors_of_one_size_are_drawn_apart():
    class Twins(Linear):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))

    seen = Recording()
    trainer(Supermask(), seen, max_epochs=1).fit(Twins(), batches(4))
    first, second = ([values[f"layer.{n}.weight"] != 0 for values in seen.training] for n in (0, 1))
    assert len(first) == 4
    assert not any(torch.equal(*masks) for masks in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_a_tensor_that_lends_all_of_its_share_to_others_stays_a_number():
    assert SparseBinaryMask(scope="global").scale(torch.zeros(2, 3)) == 1
    assert SparseBinaryMask().scale(torch.full((4,), 0.25)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": (1.0, 0.0)}, "temperature must fall to a number above 0"),
        ({"temperature": (0.1, 0.5)}, "temperature must fall"),
        ({"budget": (0.5, 0.5)}, r"budget must be two shares .* that rise within \[0, 1\], but is \(0\.5, 0\.5\)"),
        ({"budget": (-0.1, 0.5)}, "budget must be"),
        ({"budget": (0.5, 1.5)}, "budget must be"),
    ],
)
def test_wrong_arguments_of_a_prob_mask_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        ProbMask(**arguments)
