"""Search for a subnet and training of it in one fit."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from lightning_prune import BudgetError, ConfigurationError, SearchAndTrain, trace
from lightning_prune.callbacks.subnets import SubnetTraining
from lightning_prune.distillation import move_average
from lightning_prune.effective import ChannelGates, EffectiveWeights
from lightning_prune.subnet_search import SubnetSearch
from lightning_prune.threshold_net import ThresholdNet, importance_gradients, prefix, relative, standing, statistics
from tests.fits import BATCHES, SmallNet, equal, fit, loader, small_net, surface, trainer, widths


def searching(**arguments):
    few = {"of": "channels", "iterations": 2, "alpha_every": 3, "batches": 1, "coarse": 1, "at": 2, "unit": "epoch"}
    return SearchAndTrain(**{**few, **arguments})


# Masses 0.1, 0.4, 0.2, 0.3: sorted 0.4, 0.7, 0.9, 1 are reached by units 1, 3, 2, 0.
@pytest.mark.parametrize(
    ("mass", "kept"), [(0.3, [1]), (0.4, [1]), (0.41, [1, 3]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1, range(4))]
)
def test_the_shortest_prefix_with_the_mass_is_kept(mass, kept):
    mask = prefix(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log(), mass)
    assert mask.nonzero().flatten().tolist() == list(kept)


def test_of_the_best_units_the_later_come_first_where_thresholds_are_low():
    importances = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    torch.testing.assert_close(standing(importances, 0.5), torch.tensor([-0.8, 1.0, -0.4, 0.2]).double())
    assert (standing(importances, 0.9)[1:] >= standing(importances, 0.5)[1:]).all()


def test_a_choice_becomes_more_probable_when_its_reward_is_above_the_mean_and_less_below():
    seen = statistics([torch.tensor([0.1, 0.7, 0.3]), torch.tensor([0.9, 0.2])])
    net = ThresholdNet([0.6, 0.7, 0.8])
    choices = torch.tensor([[1, 2], [0, 1]])
    for nothing in ([-1.0, -1.0], [-1.0, math.nan], [-1.0, -math.inf]):
        net.reinforce(seen, choices, torch.tensor(nothing))
        torch.testing.assert_close(net.probabilities(seen), torch.full((2, 3), 1 / 3))
    net.reinforce(seen, choices, torch.tensor([-1.0, -3.0]))
    better, worse = net.probabilities(seen).gather(1, choices.T).T
    assert (better > 1 / 3 + 1e-4).all()
    assert (worse < 1 / 3 - 1e-4).all()


def test_only_how_rewards_compare_counts():
    seen, choices = statistics([torch.tensor([0.1, 0.7, 0.3])]), torch.tensor([[0], [1], [1]])
    found = []
    for rewards in (torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-0.9, -0.8, -0.4])):
        net = ThresholdNet([0.5, 0.9])
        net.reinforce(seen, choices, rewards)
        found.append(net.probabilities(seen))
    torch.testing.assert_close(*found)


def test_what_is_better_wins_in_the_long_run():
    seen, draw = statistics([torch.tensor([0.1, 0.7, 0.3])] * 3), torch.Generator().manual_seed(0)
    net = ThresholdNet([0.5, 0.9], lr=0.05)
    for _ in range(30):
        choices = torch.stack([net.sample(seen, draw) for _ in range(3)])
        net.reinforce(seen, choices, -net.thresholds[choices].sum(1))
    assert (net.probabilities(seen)[:, 0] > 0.8).all()


def test_gradients_of_importances_are_those_of_finite_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, wanted = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    groups = trace(model, (inputs,)).groups
    (name,) = groups
    tensors = dict(model.named_parameters())
    reads = model[2].weight.detach().clone()
    alpha, keep = torch.tensor([0.3, 0.9, 0.1, 0.5]).double(), torch.tensor([True, True, False, True])
    start = torch.tensor([0.6, 0.0, 0.3, 1.0]).double()

    def loss(values):
        p = values[keep].exp() / values[keep].exp().mean()
        gates = torch.zeros(4).double().index_put((keep.nonzero().flatten(),), p)
        output = model[1](model[0](inputs)) @ (reads * gates).T + model[2].bias
        importances = (start + values)[keep]
        return ((output - wanted) ** 2).mean() - 0.7 * ((importances - importances.mean()) ** 2).mean()

    effective, gating = EffectiveWeights({"2.weight": model[2].weight}), ChannelGates(groups.values(), tensors)
    gates = {name: relative(alpha, keep) * keep}
    effective.place(gating.factors(gates))
    ((model(inputs) - wanted) ** 2).mean().backward()
    found = importance_gradients(alpha, start, keep, gating.gradients(gates, effective.slopes())[name], 0.7)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(4).double()
        expected = torch.stack([(loss(alpha + step) - loss(alpha - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert found[2] == 0


def above_zero(standings):
    return {name: standing > 0 for name, standing in standings.items()}


def test_a_subnet_stays_until_a_better_one_is_drawn():
    keep, state, asked = {}, {"thresholds": [0.3, 0.9]}, []
    search = SubnetSearch({"a": torch.zeros(10)}, {"a": torch.zeros(10)}, keep, state, 0.1, 0.1, 0.0, seed=0)
    search.begin({"a": torch.arange(10.0)})

    def compete(reward, candidates=4):
        asked.clear()
        found = search.compete(candidates, 0.0, above_zero, reward, torch.Generator().manual_seed(1))
        return found, int(keep["a"].sum())

    def few_are_good(keep):
        asked.append(int(keep["a"].sum()))
        return -float(asked[-1])

    # Masses are e^(k/9) / 17.3 for the k-th unit: 0.3 of them needs 3, 0.9 needs 9.
    assert compete(few_are_good) == ((-3.0, pytest.approx(0.4)), 3)
    assert sorted(set(asked)) == [3, 9]
    assert asked[-1] == 3
    assert compete(lambda keep: float(keep["a"].sum())) == ((3.0, pytest.approx(0.4)), 9)
    assert search.present().chosen.tolist() == [1]
    assert above_zero(search.present().standings)["a"].tolist() == keep["a"].tolist()
    assert compete(lambda keep: 0.0) == ((0.0, pytest.approx(0.4)), 9)  # no better is not enough


def test_subnets_of_the_search_meet_the_budget(searched):
    _, pages = searched
    for page in pages.values():
        assert sum(int(page[name].sum()) for name in ("net.0", "net.3.expand", "net.4")) == 30


def test_importances_begin_in_the_order_of_norms_and_factors_at_one():
    start, alpha = {"a": torch.zeros(3), "b": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(2)}
    keep, state = {}, {"thresholds": [0.7]}
    search = SubnetSearch(start, alpha, keep, state, 0.1, 0.1, variance=0.0, seed=0)
    search.begin({"a": torch.tensor([5.0, 1.0, 9.0]), "b": torch.tensor([2.0, 1.0])})
    assert start["a"].tolist() == [0.5, 0.0, 1.0]
    assert start["b"].tolist() == [1.0, 0.0]
    # Masses of a, sorted: e / (e + e^0.5 + 1) = 0.51, 0.31, 0.19; of b: 0.73, 0.27.
    search.compete(2, 0.0, above_zero, lambda keep: 0.0, torch.Generator().manual_seed(0))
    assert {name: mask.tolist() for name, mask in keep.items()} == {"a": [True, False, True], "b": [True, False]}
    assert {name: gate.tolist() for name, gate in search.gates().items()} == {"a": [1, 0, 1], "b": [1, 0]}
    search.step({"a": torch.tensor([0.0, 0.0, 1.0]), "b": torch.zeros(2)})  # the loss rises with the last factor
    assert alpha["a"].tolist() == pytest.approx([0.1, 0.0, -0.1])  # a first step of Adam
    assert search.gates()["a"].tolist() == pytest.approx([2 / (1 + math.exp(-0.2)), 0, 2 / (1 + math.exp(0.2))])
    assert search.importances["a"].tolist() == pytest.approx([0.6, 0.0, 0.9])


def test_a_step_moves_the_weights_behind_the_subnet_by_their_own_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(8, 3)
    groups = trace(model, (inputs,)).groups
    gates = torch.tensor([2.0, 0.5, 0.0, 1.0])
    before = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    hidden = torch.tanh(inputs @ before["0.weight"].T + before["0.bias"])
    (hidden @ (before["2.weight"] * gates).T + before["2.bias"]).square().sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    subnet = SubnetTraining(groups, dict(model.named_parameters()))
    subnet.enter({name: gates for name in groups})
    model(inputs).square().sum().backward()
    subnet.before_step(dict(model.named_parameters()))
    optimizer.step()
    subnet.after_step()
    moved = {name: (value - 0.01 * (value.grad + 0.1 * value)).detach() for name, value in before.items()}
    for name, inside in (("0.weight", (gates > 0)[:, None]), ("0.bias", gates > 0), ("2.weight", gates > 0)):
        moved[name] = torch.where(inside, moved[name], before[name].detach())
    found = dict(model.named_parameters())
    torch.testing.assert_close(found["2.weight"].detach(), moved["2.weight"] * gates)
    torch.testing.assert_close(found["0.weight"].detach(), moved["0.weight"])
    subnet.settle({name: gates + 1 for name in groups})
    torch.testing.assert_close(found["2.weight"].detach(), moved["2.weight"] * (gates + 1))
    torch.testing.assert_close(found["0.bias"].detach(), moved["0.bias"])


class Diary(L.Callback):
    """Importances, subnet and dense weights after every step."""

    def __init__(self, pruning):
        self.pruning, self.pages = pruning, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        learnt = self.pruning.learnt
        if "dense" in learnt:
            units, dense = learnt["units"], learnt["dense"]
            page = {"dense": dense["net.4.weight"], "alpha": units["alpha"]["net.4"], **units["keep"]}
            held = {"weight": pl_module.net[9].weight.detach(), "whole": dense["net.9.weight"]}
            self.pages[trainer.global_step] = {name: value.clone() for name, value in {**page, **held}.items()}


@pytest.fixture(scope="module")
def searched():
    callback = searching()
    diary = Diary(callback)
    fit(callback, diary, epochs=3)
    return callback, diary.pages


def test_every_third_step_moves_importances_and_the_others_weights(searched):
    _, pages = searched
    assert list(pages) == list(range(BATCHES + 1, 2 * BATCHES + 1))
    for step in range(BATCHES + 2, 2 * BATCHES + 1):
        moved = {what: not torch.equal(pages[step - 1][what], pages[step][what]) for what in ("dense", "alpha")}
        turn = (step - BATCHES) % 3 == 0
        assert moved == {"dense": not turn, "alpha": turn}


def test_what_a_subnet_leaves_out_keeps_its_weights_and_comes_back(searched):
    _, pages = searched
    for step in range(BATCHES + 2, 2 * BATCHES + 1):
        before, now = pages[step - 1], pages[step]
        off = ~now["net.4"]
        assert off.any()
        assert not now["weight"][:, off].any()
        assert torch.equal(now["alpha"][off], before["alpha"][off])
        assert torch.equal(now["dense"][off], before["dense"][off])
        assert now["dense"][off].all()
        assert torch.equal(now["whole"][:, off], before["whole"][:, off])
    first, second = pages[BATCHES + 1]["net.4"], pages[2 * BATCHES]["net.4"]
    back = second & ~first
    assert back.any()
    assert pages[2 * BATCHES]["weight"][:, back].all()


def test_the_network_holds_the_weights_times_relative_masses(searched):
    _, pages = searched
    for page in pages.values():
        expected = page["whole"] * relative(page["alpha"], page["net.4"]) * page["net.4"]
        mass = page["alpha"][page["net.4"]].exp()
        torch.testing.assert_close(page["weight"], expected)
        kept = page["weight"][:, page["net.4"]] / page["whole"][:, page["net.4"]]
        torch.testing.assert_close(kept, (mass / mass.mean()).expand(3, -1))


def test_the_search_ends_with_the_budget_and_nothing_left_of_it(searched):
    callback, _ = searched
    assert callback.report.reached == 0.5
    assert callback.report.history[-1].step == 2 * BATCHES
    assert "dense" not in callback.learnt
    assert all(len(alpha) == after for (_, _, after), alpha in zip_groups(callback))


def zip_groups(callback):
    groups = [(group.name, group.before, group.after) for group in callback.report.groups]
    return [(group, callback.per_unit["alpha"][group[0]]) for group in groups]


def test_what_goes_on_training_is_the_subnet_with_its_masses(monkeypatch):
    settled, original = [], SubnetTraining.settle

    def settle(subnet, gates):
        original(subnet, gates)
        settled.append(gates)

    monkeypatch.setattr(SubnetTraining, "settle", settle)
    fit(searching(), epochs=3)
    assert [sorted(gates) for gates in settled] == [["net.0", "net.3.expand", "net.4"]]
    assert all(gate.topk(len(gate) // 4).values.mean() > 1 for gate in settled[0].values())


def test_a_search_that_has_settled_ends_at_once():
    callback = searching(thresholds=[0.4], noise=0.0, alpha_lr=1e-9, at=3, iterations=3, coarse=0)
    fit(callback, epochs=4)
    assert callback.report.history[0].step == BATCHES + 1  # the second subnet is the first


def test_a_fit_that_is_stopped_in_the_search_meets_its_budget_at_its_end():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == BATCHES + 2

    callback = searching()
    module, _ = fit(callback, Stop(), epochs=3)
    assert sum(widths(module)) == 30
    assert callback.report.reached == 0.5


def test_by_default_there_are_as_many_draws_as_there_are_steps_for():
    class Times(L.Callback):
        seen = frozenset()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen |= {pruning.learnt["iteration"]}

    pruning, times = searching(iterations=None, at=3, noise=1.0), Times()  # for each of them 3 of 12 steps
    fit(pruning, times, epochs=4)
    assert times.seen == {-1, 0, 1, 2, 3}


def test_accumulated_batches_are_one_step_for_the_weights_and_for_the_importances():
    callback = searching(alpha_every=2, iterations=1)
    diary = Diary(callback)
    fit(callback, diary, epochs=3, accumulate_grad_batches=2)
    alpha = [page["alpha"] for page in diary.pages.values()]
    assert list(diary.pages) == [3, 4, 5, 6]
    assert [torch.equal(one, other) for one, other in pairwise(alpha)] == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coarse": 2, "at": 2}, "must begin before it ends"),
        ({"alpha_every": 1}, "alpha_every must be a whole number of at least 2, but is 1"),
        ({"candidates": 1}, "candidates must be a whole number of at least 2, but is 1"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, but is 0"),
        ({"alpha_lr": 0.0}, "learning rates must be above 0"),
        ({"thresholds": [0.5, 1.2]}, "shares in"),
        ({"thresholds": []}, "shares in"),
        ({"of": "latency"}, "unknown measure of SearchAndTrain 'latency'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        searching(**arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"iterations": 3}, ConfigurationError, "3 subnets of 3 or more optimizer steps each do not fit into the 6"),
        ({"at": 7}, ConfigurationError, "can never fire"),
        ({"remove": 0.97}, BudgetError, "cannot remove 97.0 %"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(arguments, kind, message):
    module = small_net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(kind, match=message):
        fit(searching(**arguments), module=module)
    assert equal(dict(module.state_dict()), before)


def test_an_optimizer_that_computes_the_loss_again_is_refused():
    class Newton(SmallNet):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigurationError, match="LBFGS"):
        fit(searching(), module=Newton())


def test_an_average_that_is_young_forgets_fast():
    average, count = {"weight": torch.tensor([7.0]), "batches": torch.tensor(1)}, torch.tensor(5)
    values = (4.0, 14.0, 3.0)
    # Nothing of 7 stays; then 1/10 of 4, which makes 13; then 2/11, or 0.1 if that is the decay.
    for decay, last in ((0.999, 2 / 11 * 13 + 9 / 11 * 3), (0.1, 4.0)):
        for updates, value in enumerate(values):
            move_average(average, {"weight": torch.tensor([value]), "batches": count}, updates, decay)
        assert average["weight"].item() == pytest.approx(last)
    assert average["batches"] == 5
    move_average(average, {"weight": torch.tensor([1003.0]), "batches": count}, 10**6, 0.999)
    assert average["weight"].item() == pytest.approx(4 + 0.999)


class Ranked(SearchAndTrain):
    """Finds its second subnet the best of three."""

    def _reward(self, network, subnet, batches, keep):
        super()._reward(network, subnet, batches, keep)
        of_present = keep is self._search.keep
        return (-9.0, -2.0, -1.0, -1.5)[self.learnt["iteration"] + 1] if of_present else -8.0


class Lessons(L.Callback):
    """What the network and its teachers are before and after each step, and what the loss of a subnet should be."""

    def __init__(self, pruning, other):
        self.pruning, self.other, self.losses, self.held, self.taught = pruning, other, {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.pruning.searching:
            return
        taught = self.pruning.learnt["teachers"]
        self.taught[trainer.global_step] = copy.deepcopy({name: taught[name] for name in ("coarse", "best", "reward")})
        teachers = [self.other]
        for name in ("coarse", "best") if taught["reward"] > -9 else ("coarse",):
            teachers.append(small_net())
            teachers[-1].load_state_dict(taught[name])
        network = small_net()
        network.load_state_dict(pl_module.state_dict())
        with torch.no_grad():
            scores, wanted = network(batch[0]), [teacher.eval()(batch[0]) for teacher in teachers]
            counts = torch.stack([-cross_entropy(one, batch[1], reduction="none") for one in wanted]).softmax(0)
            apart = [kl_div((scores / 4).log_softmax(1), (w / 4).softmax(1), reduction="none").sum(1) for w in wanted]
            teaching = (counts * torch.stack(apart)).sum(0).mean()
            expected = 0.5 * cross_entropy(scores, batch[1]) + 0.5 * 16 * teaching
        self.losses[trainer.global_step] = [len(teachers), expected.item()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.held[step] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        if step - 1 in self.losses:
            self.losses[step - 1].append(outputs["loss"].item())


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    other, path = small_net(seed=4), tmp_path_factory.mktemp("teacher") / "other.ckpt"
    used = trainer(epochs=1)
    used.fit(other, loader())
    used.save_checkpoint(path)
    callback = Ranked(
        of="channels", coarse=1, at=4, unit="epoch", iterations=4, alpha_every=3, batches=1, robust=True,
        teachers=[str(path)],
    )  # fmt: skip
    lessons, module = Lessons(callback, other), small_net()
    before = surface(module)
    module, used = fit(callback, lessons, module=module, epochs=5)
    assert surface(module) == before
    assert "training_step" not in vars(used.strategy)
    return callback, lessons


def test_the_loss_of_a_subnet_is_half_that_of_teachers_weighed_by_their_errors(taught):
    _, lessons = taught
    assert list(lessons.losses) == list(range(BATCHES, 4 * BATCHES))
    assert [count for count, *_ in lessons.losses.values()][:: BATCHES - 1] == [2, 3, 3, 3]
    for _, expected, found in lessons.losses.values():
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_coarse_network_teaches_as_its_average_which_ends_with_it(taught):
    _, lessons = taught
    expected = None
    for step in range(1, BATCHES + 1):
        share = (step - 1) / (step + 8)
        now = lessons.held[step]["net.4.weight"]
        expected = now if expected is None else share * expected + (1 - share) * now
    for state in lessons.taught.values():
        torch.testing.assert_close(state["coarse"]["net.4.weight"], expected)


def test_the_best_subnet_teaches_from_its_end_on(taught):
    callback, lessons = taught
    rewards = [state["reward"] for state in lessons.taught.values()]
    changes = [BATCHES + n for n in range(1, len(rewards)) if rewards[n] != rewards[n - 1]]
    assert [rewards[step - BATCHES] for step in changes] == [-2.0, -1.0]
    for step in changes:
        assert equal(lessons.taught[step]["best"], lessons.held[step])
    assert equal(lessons.taught[4 * BATCHES - 1]["best"], lessons.held[changes[1]])
    assert "teachers" not in callback.learnt


def test_before_there_is_a_subnet_training_is_as_without_teachers(taught):
    _, lessons = taught
    assert equal(lessons.held[BATCHES], dict(fit(epochs=1)[0].state_dict()))


def test_outputs_that_are_no_class_scores_are_refused_at_the_first_step():
    class Values(SmallNet):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[1][:, None]).square().mean()

    data = torch.utils.data.DataLoader([(torch.randn(2, 6, 6), torch.randn(())) for _ in range(48)], batch_size=8)
    with pytest.raises(ConfigurationError, match="0 tensors of the batch"):
        fit(searching(robust=True), module=Values(), data=data)


def test_teachers_that_nobody_asks_are_refused():
    with pytest.raises(ConfigurationError, match="only with robust=True"):
        searching(teachers=["some.ckpt"])
    with pytest.raises(ConfigurationError, match=r"no checkpoint 'some\.ckpt'"):
        fit(searching(teachers=["some.ckpt"], robust=True))


def test_a_new_threshold_network_leaves_the_random_states_of_all_devices_alone():
    def states():
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return [torch.get_rng_state(), *cuda], list(torch.cuda._lazy_seed_tracker.get_calls())

    (before, waiting), _ = states(), ThresholdNet([0.5, 0.9], seed=3)
    after, still = states()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert still == waiting  # what is to be done to CUDA once it is used
