"""What only some runs show: networks that are joined once in a while, losses that end, and losses that begin late."""

from __future__ import annotations

import copy
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_prune import (
    BayesianPruning,
    ChannelPruning,
    GReg,
    GrowAndPrune,
    Linear,
    OneShot,
    PruneError,
    SoftFilterPruning,
)
from lightning_prune.graph.channels import Refusal
from lightning_prune.graph.known import Known, known_of
from lightning_prune.graph.program import module_programs
from lightning_prune.surgery import shrink, trace_programs
from tests.helpers import Net


def fit(module, callback, tmp_path, epochs=4, ckpt_path=None, **arguments):
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=epochs, callbacks=[callback], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, **{"enable_checkpointing": False, **arguments},
    )  # fmt: skip
    L.seed_everything(5)
    batches = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=8), ckpt_path=ckpt_path)
    return callback


class Synchronised(L.LightningModule):
    """A target network that becomes what the online one is, once in seven steps of training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.online = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        if self.global_step % 7 == 0:
            self.target.load_state_dict(self.online.state_dict())
        return mse_loss(self.online(batch), 0.9 * self.target(batch.flip(1)) + batch[:, :3])

    def configure_optimizers(self):
        return torch.optim.SGD(self.online.parameters(), lr=0.1)


METHODS = {
    "channels": lambda: ChannelPruning(remove=0.5, schedule=Linear(1, 13, 2, "step")),
    "soft filters": lambda: SoftFilterPruning(remove=0.5),
    "greg": lambda: GReg(remove=0.5),
    "bayesian": lambda: BayesianPruning(remove=0.5, rounds=3),
    "growing": lambda: GrowAndPrune(remove=0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_was_seen_together_once_is_cut_alike_ever_after(method, tmp_path):
    module = Synchronised()
    callback = fit(module, METHODS[method](), tmp_path, epochs=5)
    assert callback.report.reached > 0.4
    shapes = [[tuple(p.shape) for p in net.parameters()] for net in (module.online, module.target)]
    assert shapes[0] == shapes[1]
    assert not any(name.startswith("target") for name in callback.kept)


def test_a_fit_that_is_resumed_between_such_steps_knows_of_them(tmp_path):
    """The checkpoint is of a step at which nothing is copied, and so is what the resumed fit sees first."""
    through = Synchronised()
    fit(through, METHODS["channels"](), tmp_path)
    fit(Synchronised(), METHODS["channels"](), tmp_path, epochs=2, enable_checkpointing=True)
    (stopped,) = tmp_path.rglob("epoch=*.ckpt")
    resumed = Synchronised()
    fit(resumed, METHODS["channels"](), tmp_path, ckpt_path=stopped)
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Consistent(L.LightningModule):
    """Two branches whose features are to agree, in some epochs only."""

    def __init__(self, epochs):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
        self.epochs = epochs

    def training_step(self, batch, batch_idx):
        hidden = torch.relu(self.stem(batch))
        features = torch.relu(self.first(hidden)), torch.relu(self.second(hidden))
        loss = sum(mse_loss(head(f), batch[:, :1]) for head, f in zip(self.heads, features, strict=True))
        return loss + mse_loss(*features) if self.current_epoch in self.epochs else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_was_held_once_stays_whole_and_the_first_reason_is_told(tmp_path):
    module = Consistent(epochs=[0])
    callback = fit(module, ChannelPruning(remove=0.4, schedule=Linear(3, 11, 4, "step")), tmp_path)
    assert (module.first.out_features, module.second.out_features) == (8, 8)
    assert module.stem.out_features < 16
    reasons = dict(callback.report.refused)
    assert "averaged over by mse_loss" in reasons["first.weight (dim 0)"]


def test_a_failure_after_a_cut_says_what_may_have_caused_it(tmp_path):
    callback = ChannelPruning(remove=0.3, schedule=OneShot(2, "step"), exclude="second")
    module = Consistent(epochs=[3])
    with pytest.warns(UserWarning, match="failed after channels had gone, since step 2"), pytest.raises(RuntimeError):
        fit(module, callback, tmp_path)


class Failing(Consistent):
    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 3:
            raise PruneError("of our own")


@pytest.mark.parametrize(("module", "cut_at"), [(Consistent(epochs=[2]), 15), (Failing(epochs=[]), 2)])
def test_other_failures_are_not_explained(module, cut_at, tmp_path, recwarn):
    """Those before a cut, and those that say themselves what is wrong."""
    if type(module) is Consistent:
        module.training_step = lambda batch, batch_idx: 1 / 0 if module.global_step else module.stem(batch).sum()
    with pytest.raises((PruneError, ZeroDivisionError)):
        fit(module, ChannelPruning(remove=0.1, schedule=OneShot(cut_at, "step")), tmp_path)
    assert not any("failed after" in str(warning.message) for warning in recwarn)


class Experts(L.LightningModule):
    """A mixture of which each batch asks one expert, another one each time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3))
        self.always = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        asked = self.experts[self.asked()]
        return mse_loss(asked(batch) + self.always(batch), batch[:, :3])

    def asked(self):
        return self.global_step // 6 % 3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:(.*runs that channels were found by did not use|steps have used)")
def test_what_no_run_uses_any_more_is_reported_as_wide_as_it_is(tmp_path):
    module = Experts()
    schedule = Linear(1, 13, 6, "step")  # while the first expert is asked, then the second, then the third
    callback = fit(module, ChannelPruning(remove=0.5, of="channels", schedule=schedule), tmp_path)
    told = {group.name: group.after for group in callback.report.groups}
    really = {name: module.get_submodule(name).out_features for name in told}
    assert told == really == {name: len(units) for name, units in callback.kept.items()}
    assert really["experts.0.0"] > 1
    assert callback.report.reached == 1 - sum(told.values()) / sum(g.before for g in callback.report.groups)


# By hand --------------------------------------------------------------------------------------------------------------


def known(**index):
    slots = [(name.replace("_", "."), 0, torch.tensor(positions)) for name, positions in index.items()]
    return Known({"group": slots}, ["a.weight", "b.weight"], {"c (dim 0)": "for a reason"})


def test_positions_follow_a_cut():
    before = known(a_weight=[[0], [1], [2], [3]], b_weight=[[0, 4], [1, 5], [2, 6], [3, 7]])
    kept = {"a.weight": [(0, torch.tensor([0, 2, 3]))], "b.weight": [(0, torch.tensor([0, 2, 3, 4, 6, 7]))]}
    after = before.after(kept)
    assert [index.tolist() for _, _, index in after.groups["group"]] == [[[0], [1], [2]], [[0, 3], [1, 4], [2, 5]]]
    assert after.used == ["a.weight", "b.weight"]
    assert after.reasons == before.reasons


def test_nothing_is_known_of_what_has_grown():
    after = known(a_weight=[[0], [1]]).after({"a.weight": [(0, torch.tensor([0, 0, 1, 1]))]})
    assert after.groups == {}
    assert after.used == ["b.weight"]


def test_it_is_the_same_after_a_file():
    before = known(a_weight=[[0], [1]])
    after = Known(**before.plain())
    assert after.plain().keys() == before.plain().keys()
    assert torch.equal(after.groups["group"][0][2], before.groups["group"][0][2])


def test_two_groups_that_were_one_stay_one():
    net = Net(lambda net, x: net.c(net.a(x)) + net.d(net.b(x)), a=nn.Linear(4, 6), b=nn.Linear(4, 6),
              c=nn.Linear(6, 2), d=nn.Linear(6, 2))  # fmt: skip
    programs = programs_of(net)
    apart = trace_programs(net, programs)
    assert set(apart.groups) == {"a", "b"}
    order = torch.tensor([[5], [4], [3], [2], [1], [0]])
    joined = Known({"a": [("a.weight", 0, torch.arange(6)[:, None]), ("b.weight", 0, order)]})
    graph = trace_programs(net, programs, known=joined)
    assert set(graph.groups) == {"a"}
    places = {slot.tensor: slot.index.flatten().tolist() for slot in graph.groups["a"].slots}
    assert places["a.weight"] == places["c.weight"] == [0, 1, 2, 3, 4, 5]
    assert places["b.weight"] == places["d.weight"] == [5, 4, 3, 2, 1, 0]


def test_what_was_in_no_group_stays_in_none():
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    programs = programs_of(net)
    held = known_of([], ["a.weight"], [Refusal("a.weight (dim 0)", "for a reason")])
    graph = trace_programs(net, programs, known=held)
    assert not graph.groups
    assert ("a.weight (dim 0)", "for a reason") in graph.refused


def test_a_name_is_not_given_to_another_group():
    """Two groups of one module: where the first is down to one unit, the second keeps its name."""
    net = Net(lambda net, x: net.b(torch.relu(net.a(x) @ net.more)), a=nn.Linear(4, 6), b=nn.Linear(5, 2))
    net.more = nn.Parameter(torch.randn(6, 5))
    names = [("a.weight", 0, 1), ("a.bias", 0, 1), ("more", 0, 1)], [("more", 1, 1), ("b.weight", 1, 1)]
    widths = 6, 5
    known = Known({
        name: [(tensor, dim, torch.arange(width)[:, None]) for tensor, dim, _ in slots]
        for name, slots, width in zip(("first", "first#2"), names, widths, strict=True)
    })  # fmt: skip
    graph = trace_programs(net, programs_of(net), known=known)
    assert {name: group.width for name, group in graph.groups.items()} == {"first": 6, "first#2": 5}
    known.groups.pop("first")
    graph = trace_programs(net, programs_of(net), known=known)
    assert {name: group.width for name, group in graph.groups.items()} == {"a": 6, "first#2": 5}


def test_what_was_not_compared_has_no_error():
    net = Net(lambda net, x: net.b(torch.relu(net.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    program = programs_of(net)[0]
    graph = trace_programs(net, [replace(program, training=True)])
    assert shrink(net, graph, {"a": torch.arange(3)}).error is None
    assert net.a.out_features == 3


def programs_of(net):
    return module_programs(net, torch.randn(3, 4))
