"""Weights that come and go while the network trains: RigL and SET, dense-sparse-dense, dynamic network surgery."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import DSD, SET, ConfigurationError, DynamicNetworkSurgery, Linear, RigL
from lightning_prune.callbacks.dynamic_surgery import spliced
from lightning_prune.rewiring import rewired
from lightning_prune.schedules import Position
from tests.fits import BATCHES, SmallNet, equal, fit, images, loader, small_net, surface, trainer

KEEP = torch.tensor([[True, True, False, True], [False, True, False, True]])
SIZE = torch.tensor([[5.0, 0.2, 0, 3.0], [0, 0.1, 0, 4.0]])


class Diary(L.Callback):
    """What there is right before each batch, after the callbacks that are listed earlier."""

    def __init__(self, pruning):
        self.pruning, self.pages = pruning, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        masks = self.pruning._network.weights.state_dict()
        states = {name: trainer.optimizers[0].state.get(p, {}) for name, p in pl_module.named_parameters()}
        self.pages.append(copy.deepcopy((pl_module.state_dict(), masks, states)))

    def matrices(self, page):
        """By name the weights, which of them are on, and what the optimizer keeps for them."""
        weights, masks, states = self.pages[page]
        on = {name: masks.get(name, torch.ones_like(weights[name], dtype=torch.bool)) for name in states}
        return {name: (weights[name], on[name], states[name]) for name in states if weights[name].dim() > 1}


@pytest.mark.parametrize(
    ("growth", "share", "expected"),
    [
        ([[9, 1, 7, 9], [5, 1, 6, 9]], 0.4, [[1, 0, 1, 1], [0, 0, 1, 1]]),  # 0.1 and 0.2 go; 7 and 6 come
        ([[9, 1, 7, 9], [5, 8, 6, 9]], 0.4, [[1, 0, 1, 1], [0, 1, 0, 1]]),  # 8 was dropped and comes again
        ([[9, 1, 7, 9], [5, 1, 6, 9]], 0.39, [[1, 1, 1, 1], [0, 0, 0, 1]]),  # 1.95 weights are one
        ([[9, 1, 7, 9], [5, 1, 6, 9]], 0.19, KEEP.tolist()),
    ],
)
def test_the_smallest_weights_go_and_as_many_grow(growth, share, expected):
    assert torch.equal(rewired("w", KEEP, SIZE, torch.tensor(growth).float(), share), torch.tensor(expected).bool())


@pytest.mark.parametrize(("done", "share"), [(0, 0.3), (0.25, 0.225), (0.375, 0.15), (0.5, 0.075), (0.75, 0)])
def test_the_share_that_is_dropped_falls_along_half_a_cosine(done, share):
    assert RigL(fraction=0.3, stop=0.75).share(Position(0, 0, done)) == pytest.approx(share)


@pytest.mark.parametrize("method", [SET, RigL])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_updates_trade_the_smallest_weights_for_others_at_zero(method, optimizer):
    callback = method(remove=0.7, every=3, fraction=0.5, scope="layer", floor=1, shrink="never")
    before, after = Diary(callback), Diary(callback)
    module = small_net(optimizer=optimizer)
    numbers = {row: parameter.numel() for row, parameter in module.named_parameters() if parameter.dim() > 1}
    fit(before, callback, after, module=module)
    kept = {row.name: row.after for row in callback.report.weights}
    assert sum(kept.values()) == round(0.3 * sum(numbers.values()))
    assert kept.keys() == numbers.keys()
    changed = set()
    for step in range(1, 3 * BATCHES):
        share = callback.share(Position(0, 0, step / 18)) if step in (3, 6, 9, 12) else 0
        for name, (weight, new, state) in after.matrices(step).items():
            earlier, old, _ = before.matrices(step)[name]
            count, stayed = int(share * kept[name]), old & new
            assert old.sum() == new.sum() == kept[name]
            assert kept[name] - count <= stayed.sum()
            assert torch.equal(weight, earlier * stayed)  # what has grown is zero, as is what has gone
            if (old & ~new).any():
                assert (earlier[old].abs() < earlier[old & ~new].abs().max()).sum() < count
                changed.add(step)
            slots = [value for value in state.values() if torch.is_tensor(value) and value.shape == new.shape]
            assert slots
            assert all(torch.count_nonzero(slot[~stayed]) == 0 for slot in slots)
    assert changed == {3, 6, 9, 12}
    assert callback.report.reached == pytest.approx(0.7, abs=1e-3)
    assert len(callback.report.history) == 1


def test_rigl_grows_where_the_gradient_of_all_weights_is_largest():
    callback = RigL(remove=0.6, every=4, fraction=0.5, scope="layer", shrink="never")
    before, after = Diary(callback), Diary(callback)
    fit(before, callback, after, data=loader(1), epochs=8)
    module, grown = small_net(), 0
    module.load_state_dict(before.pages[4][0])
    inputs, labels = images(1).tensors
    cross_entropy(module(inputs), labels).backward()
    for name, (weight, on, _) in before.matrices(4).items():
        count = int(callback.share(Position(0, 0, 0.5)) * on.sum())
        expected, gradient = on.clone(), module.get_parameter(name).grad.abs()
        expected.view(-1)[weight.abs().masked_fill(~on, torch.inf).flatten().argsort()[:count]] = False
        expected.view(-1)[gradient.masked_fill(expected, -1).flatten().argsort(descending=True)[:count]] = True
        assert torch.equal(after.matrices(4)[name][1], expected), name
        grown += int((expected & ~on).sum())
    assert grown > 50


def test_updates_go_on_in_a_second_fit():
    module, callback = small_net(), SET(remove=0.5, every=4, shrink="never")
    masks = []
    for _ in range(2):
        fit(callback, module=module)
        masks.append({name: p != 0 for name, p in module.named_parameters() if p.dim() > 1})
    assert callback.report.reached == pytest.approx(0.5, abs=1e-3)
    assert not equal(*masks)


@pytest.mark.parametrize("method", [SET, RigL])
def test_an_interval_longer_than_the_fit_is_a_warning(method):
    with pytest.warns(UserWarning, match=r"never moves: updates are 15 .* after 0\.75 of the 18 steps of this fit"):
        fit(method(remove=0.5, every=15))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the mask never moves")
        fit(method(remove=0.5, every=13))


@pytest.mark.parametrize("method", [SET, RigL])
def test_a_fit_without_a_known_end_is_refused(method):
    module, endless = small_net(), {"epochs": -1, "max_time": {"seconds": 2}}
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match=f"{method.__name__} drops fewer weights .* max_epochs or max_steps"):
        fit(method(remove=0.5), module=module, **endless)
    assert equal(dict(module.state_dict()), dict(before))
    callback = method(remove=0.5, shrink="never")
    fit(callback, module=module, epochs=-1, max_steps=3)
    with pytest.raises(ConfigurationError, match="max_epochs or max_steps"):
        fit(callback, module=module, **endless)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        (RigL, {"every": 0}, "every must be a whole number of at least 1"),
        (SET, {"fraction": 1.0}, r"fraction must be in \(0, 1\)"),
        (SET, {"stop": 0}, r"stop in \(0, 1\]"),
        (DSD, {"start": 0.5, "end": 0.5}, "start < end < 1, but start is 0.5"),
        (DSD, {"end": 1.0}, "end is 1.0"),
        (DynamicNetworkSurgery, {"gamma": -1}, "gamma and power must be at least 0"),
        (DynamicNetworkSurgery, {"remove": 1.5}, "remove"),
    ],
)
def test_wrong_arguments_are_refused(method, arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        method(**arguments)


def test_dsd_is_dense_then_sparse_then_dense():
    callback = DSD(remove=0.4)
    diary, module = Diary(callback), small_net()
    before = surface(module)
    fit(callback, diary, module=module)
    steps = [diary.matrices(step) for step in range(18)]
    for step, matrices in enumerate(steps):
        for name, (weight, on, _) in matrices.items():
            off = ~steps[6][name][1]
            assert float(off.float().mean()) == pytest.approx(0.4, abs=1 / off.numel())
            assert torch.equal(~on, off if 6 <= step < 12 else torch.zeros_like(off))
            assert step >= 6 or not (weight == 0).any()
            assert not 6 <= step <= 12 or torch.count_nonzero(weight[off]) == 0  # at 12 they are free, and at zero
    for name, (weight, on, _) in steps[6].items():
        assert steps[5][name][0][~on].abs().mean() < weight[on].abs().mean() / 2
        assert torch.count_nonzero(steps[13][name][0][~on]) > 0.9 * (~on).sum()
    assert surface(module) == before
    assert callback.report.reached == 0
    assert [round(event.removed, 3) for event in callback.report.history] == [0.4]
    assert "requested 0.0% of weights, reached 0.0%" in callback.report.table()


@pytest.mark.parametrize("step", [4, 8, 15])
def test_dsd_resumes_in_each_phase(step, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    callback = DSD()
    module, whole = fit(callback, keep, enable_checkpointing=True)
    again, resumed = DSD(), small_net(seed=9)
    used = trainer(again)
    used.fit(resumed, loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert equal(resumed.state_dict(), module.state_dict())
    assert equal(used.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    assert again.report.history == callback.report.history
    assert again.report.reached == 0


@pytest.mark.parametrize(
    ("was_kept", "weight", "is_kept"),
    [
        (True, 1.79, False), (True, -1.81, True), (True, 2.19, True), (True, 2.21, True),
        (False, 1.79, False), (False, 1.81, False), (False, -2.19, False), (False, -2.21, True),
    ],
)  # fmt: skip
def test_masks_change_only_well_away_from_the_threshold(was_kept, weight, is_kept):
    assert spliced(torch.tensor([was_kept]), torch.tensor([weight]), 2.0).item() == is_kept


class Line(L.LightningModule):
    """Eight weights, and nothing else."""

    def __init__(self, optimizer=torch.optim.SGD, raw=False):
        super().__init__()
        self.automatic_optimization = not raw
        self.line, self.optimizer = torch.nn.Linear(4, 2, bias=False), optimizer
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[0.9, -0.2, 0.35, 0.5], [-0.3, 0.8, 0.1, -0.6]]))

    def training_step(self, batch, batch_idx):
        loss = ((self.line(batch[0]) - batch[1]) ** 2).sum()
        if not self.automatic_optimization:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


def line_data():
    draw = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(12, 4, generator=draw), 2 * torch.randn(12, 2, generator=draw))


def surgery_by_hand(steps, rounds):
    """The weights after every step: a masked point, a gradient there, and a step of all that is behind the mask."""
    dense, keep, threshold, seen = Line().line.weight.detach().clone(), torch.ones(2, 4).bool(), 0.0, []
    inputs, targets = line_data().tensors
    for step in range(steps):
        if step in rounds:
            order = dense.abs().flatten().sort().values
            threshold = float(order[8 - rounds[step]])
            if rounds[step] == 2:
                keep = dense.abs() >= threshold
                dense = dense * keep
            else:
                keep = (keep & (dense.abs() >= 0.9 * threshold)) | (dense.abs() >= 1.1 * threshold)
        point = (dense * keep).requires_grad_()
        batch = slice(step % 6 * 2, step % 6 * 2 + 2)
        ((inputs[batch] @ point.T - targets[batch]) ** 2).sum().backward()
        settled = step >= max(rounds)
        dense = dense - 0.05 * (point.grad * keep if settled else point.grad)
        if not settled:
            keep = (keep & (dense.abs() >= 0.9 * threshold)) | (dense.abs() >= 1.1 * threshold)
        seen.append((dense * keep, keep))
    return seen


@pytest.mark.parametrize("raw", [False, True], ids=["announced", "behind the back of Lightning"])
def test_surgery_moves_what_it_has_cut_by_the_gradient_at_the_masked_weights(raw):
    class Weights(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(pl_module.line.weight.detach().clone())

    weights, schedule = Weights(), Linear(0, 2, 1, "epoch")
    callback = DynamicNetworkSurgery(0.75, schedule, scope="layer", gamma=0, shrink="never")
    trainer(callback, weights, epochs=3).fit(Line(raw=raw), DataLoader(line_data(), batch_size=2))
    expected = surgery_by_hand(18, {0: 6, 6: 4, 12: 2})
    back = sum(int((new & ~old).sum()) for (_, old), (_, new) in pairwise(expected))
    assert back > 0  # else there was no splicing to see
    assert len(weights.seen) == 18
    for step, (found, (wanted, _)) in enumerate(zip(weights.seen, expected, strict=True)):
        torch.testing.assert_close(found, wanted, msg=f"after step {step}")
    assert callback.report.reached == 0.75


def test_checkpoints_of_a_surgery_hold_the_masked_weights(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit(DynamicNetworkSurgery(remove=0.9), keep, enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    learnt = saved["lightning_prune"]["learnt"]
    assert len(learnt["keep"]) == 6
    for name, mask in learnt["keep"].items():
        assert 0 < mask.float().mean() < 1
        assert torch.equal(saved["state_dict"][name], learnt["dense"][name] * mask)
        assert torch.count_nonzero(learnt["dense"][name]) == mask.numel()
    last = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["lightning_prune"]
    assert last["learnt"].keys().isdisjoint({"dense", "keep"})
    assert last["weights"].keys() == learnt["keep"].keys()


def test_updates_become_rare():
    def changes(power):
        class Masks(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                masks.append(dict(callback.learnt.get("keep", {})))

        masks = []
        callback = DynamicNetworkSurgery(0.8, Linear(0, 17, 17, "step"), gamma=1.0, power=power)
        fit(callback, Masks())
        return sum(not equal(old, new) for old, new in pairwise(masks[:16]))

    assert changes(power=0) > 12
    assert changes(power=20) == 0


def test_a_surgery_that_is_not_over_when_the_fit_ends_settles_on_what_it_had_reached():
    callback = DynamicNetworkSurgery(0.8, Linear(0, 4, 2, "epoch"), floor=1)
    with pytest.warns(UserWarning, match="only partly reached"):
        module, _ = fit(callback)
    assert callback.report.reached == pytest.approx(0.8 * 2 / 3, abs=0.01)
    assert sum(row.after for row in callback.report.weights) == sum(
        int(torch.count_nonzero(p)) for p in module.parameters() if p.dim() > 1
    )
    assert any("before the last round" in note for note in callback.report.notes)


def test_an_optimizer_that_computes_the_loss_in_its_step_is_refused():
    class Searching(SmallNet):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigurationError, match="LBFGS computes the loss again"):
        fit(DynamicNetworkSurgery(), module=Searching())
