"""The laws of the reinitialisations that keep a property of the ticket, by exact and by statistical comparison."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.reinit import (
    KeepDistribution,
    KeepMagnitude,
    KeepSign,
    KeepSignAndDistribution,
    Random,
    Reinit,
    Rewind,
    WeightLaw,
)

HOWS = ["permute", "bootstrap", "kernel", "normal"]
LAWS = [
    KeepSign(),
    KeepMagnitude(),
    KeepSignAndDistribution(),
    *[KeepDistribution(how) for how in HOWS],
    KeepDistribution("kernel", "filter", True),
]
LEVEL = 1.95
"""Kolmogorov-Smirnov statistics times the square root of the sample size exceed this once in a thousand times."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def distance(sample, cdf):
    """Largest distance between the sample's distribution function and the given one, times sqrt(n)."""
    ordered = sample.double().sort().values
    n = len(ordered)
    expected = cdf(ordered)
    above, below = torch.arange(1, n + 1) / n - expected, expected - torch.arange(n) / n
    return float(torch.maximum(above, below).max()) * math.sqrt(n)


def distance_of_two(first, second):
    """As :func:`distance`, for two samples, which may have ties."""
    places = torch.cat([first, second]).sort().values
    parts = [torch.searchsorted(x.sort().values, places, right=True) / len(x) for x in (first, second)]
    n = len(first) * len(second) / (len(first) + len(second))
    return float((parts[0] - parts[1]).abs().max()) * math.sqrt(n)


class Ticket:
    """A layer of which a third survives, with initial weights that have few small values and more plus than minus."""

    def __init__(self, outputs: int = 60, inputs: int = 250) -> None:
        self.layer = nn.Linear(inputs, outputs)
        self.mask = torch.rand(outputs, inputs, generator=generator(1)) < 1 / 3
        sizes = 0.5 + torch.rand(outputs, inputs, generator=generator(2))
        signs = torch.where(torch.rand(outputs, inputs, generator=generator(3)) < 0.7, 1.0, -1.0)
        self.first = torch.where(self.mask, sizes * signs, 1000.0)

    def after(self, reinit: Reinit, seed: int = 0):
        """Surviving weights before training and after the reinitialisation, as matrices' kept entries."""
        names, origin = ["weight", "bias"], {"weight": self.first, "bias": torch.full_like(self.layer.bias, 1000.0)}
        assert reinit(self.layer, names, generator(seed), origin, {"weight": self.mask}) == []
        new = self.layer.weight.detach()
        assert not new[~self.mask].any()
        return self.first[self.mask], new[self.mask].clone()


def test_sign_keeps_signs_and_draws_sizes_by_the_law_of_the_module() -> None:
    old, new = Ticket().after(KeepSign())
    assert torch.equal(new.sign(), old.sign())
    bound = 1 / math.sqrt(250)
    assert distance(new.abs(), lambda x: x / bound) < LEVEL
    assert distance(old.abs(), lambda x: (x / bound).clamp(max=1)) > 10 * LEVEL
    assert abs(float(torch.corrcoef(torch.stack([old.abs(), new.abs()]))[0, 1])) < 4 / math.sqrt(len(old))


def test_magnitude_keeps_sizes_and_tosses_for_signs() -> None:
    old, new = Ticket().after(KeepMagnitude())
    assert torch.equal(new.abs(), old.abs())
    limit = 4 / math.sqrt(len(old))
    assert abs(float(new.sign().mean())) < limit
    assert abs(float((new.sign() * old.sign()).mean())) < limit


def test_sign_and_distribution_exchanges_sizes_under_the_same_signs() -> None:
    old, new = Ticket().after(KeepSignAndDistribution())
    assert torch.equal(new.sign(), old.sign())
    assert torch.equal(new.abs().sort().values, old.abs().sort().values)
    assert not torch.equal(new[old > 0].sort().values, old[old > 0].sort().values)
    assert abs(float(torch.corrcoef(torch.stack([old.abs(), new.abs()]))[0, 1])) < 4 / math.sqrt(len(old))


def test_an_exact_zero_does_not_swallow_a_size() -> None:
    layer = nn.Linear(4, 1)
    origin = {"weight": torch.tensor([[0.0, -1.0, 2.0, -3.0]])}
    for seed in range(5):
        KeepSignAndDistribution()(layer, ["weight"], generator(seed), origin)
        assert layer.weight.abs().sort().values.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_permuting_keeps_every_value_and_no_place() -> None:
    old, new = Ticket().after(KeepDistribution())
    assert torch.equal(new.sort().values, old.sort().values)
    assert abs(float(torch.corrcoef(torch.stack([old, new]))[0, 1])) < 4 / math.sqrt(len(old))


def test_every_order_is_equally_likely() -> None:
    layer, origin = nn.Linear(3, 1), {"weight": torch.tensor([[1.0, 2.0, 3.0]])}
    source, counts = generator(), {}
    for _ in range(1200):
        KeepDistribution()(layer, ["weight"], source, origin)
        order = tuple(layer.weight.detach().flatten().tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5  # chi square, 5 degrees, one in a thousand


def test_bootstrap_draws_values_with_replacement() -> None:
    old, new = Ticket().after(KeepDistribution("bootstrap"))
    assert set(new.tolist()) <= set(old.tolist())
    assert len(set(new.tolist())) / len(set(old.tolist())) == pytest.approx(1 - 1 / math.e, abs=0.03)
    assert distance_of_two(old, new) < LEVEL


def test_the_kernel_estimate_is_drawn_from() -> None:
    old, new = Ticket().after(KeepDistribution("kernel"))
    assert len(set(new.tolist()) & set(old.tolist())) < 0.01 * len(old)
    exact = old.double()
    width = 0.9 * float(exact.std(correction=0)) * len(old) ** -0.2

    def estimate(x):
        return torch.stack([normal_cdf((value - exact) / width).mean() for value in x])

    assert distance(new, estimate) < LEVEL
    assert distance(old, estimate) > LEVEL


def test_the_kernel_has_the_width_of_silverman() -> None:
    layer = nn.Linear(100, 100)
    first = torch.where(torch.arange(10_000).view(100, 100) % 2 == 0, 1.0, -1.0)  # deviation 1
    KeepDistribution("kernel")(layer, ["weight"], generator(), {"weight": first})
    noise = layer.weight.detach() - layer.weight.detach().sign()
    assert float(noise.std()) == pytest.approx(0.9 * 10_000**-0.2, rel=0.04)


def test_the_normal_law_has_the_moments_of_the_survivors() -> None:
    old, new = Ticket().after(KeepDistribution("normal"))
    mean, deviation = float(old.double().mean()), float(old.double().std(correction=0))
    assert distance(new, lambda x: normal_cdf((x - mean) / deviation)) < LEVEL
    assert float(new.mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(len(old)))
    assert float(new.std()) == pytest.approx(deviation, rel=0.04)
    assert distance(old, lambda x: normal_cdf((x - mean) / deviation)) > LEVEL


@pytest.mark.parametrize("how", ["permute", "bootstrap"])
def test_the_law_is_that_of_the_survivors_and_not_of_the_module(how) -> None:
    old, new = Ticket().after(KeepDistribution(how))
    fresh = Ticket().after(Random())[1]
    assert distance_of_two(old, new) < LEVEL < 10 * LEVEL < distance_of_two(old, fresh)


@pytest.mark.parametrize("per", ["layer", "filter"])
@pytest.mark.parametrize("how", HOWS)
def test_signs_are_kept_where_the_law_depends_on_them(how, per) -> None:
    old, new = Ticket().after(KeepDistribution(how, per, sign_conditional=True))
    assert torch.equal(new.sign(), old.sign())
    assert not torch.equal(new, old)
    if how == "permute":
        for sign in (1, -1):
            assert torch.equal(new[old.sign() == sign].sort().values, old[old.sign() == sign].sort().values)


SHAPES = {
    "linear": (nn.Linear(50, 4), lambda w: list(w)),
    "conv": (nn.Conv2d(6, 4, 3), lambda w: list(w)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), lambda w: list(w)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), lambda w: list(w.transpose(0, 1))),
    "grouped transposed": (
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        lambda w: [w[:3, 0], w[:3, 1], w[3:, 0], w[3:, 1]],
    ),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_law_for_each_filter(kind, how) -> None:
    layer, filters = SHAPES[kind]
    first = torch.rand(layer.weight.shape, generator=generator())
    for number, part in enumerate(filters(first)):
        part += 10 * number
    KeepDistribution(how, per="filter")(layer, ["weight"], generator(), {"weight": first})
    moved = 0
    for number, (old, new) in enumerate(zip(filters(first), filters(layer.weight.detach()), strict=True)):
        assert (new - 10 * number).abs().max() < 3
        if how == "permute":
            assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)
        moved += int((new != old).sum())
    assert moved > 0.8 * first.numel()
    KeepDistribution(how)(layer, ["weight"], generator(), {"weight": first})
    assert any(part.std() > 3 for part in filters(layer.weight.detach()))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm([4, 5]), nn.Linear(4, 2), attention)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("reinit", LAWS, ids=str)
def test_all_but_the_weights_is_reset(reinit) -> None:
    model = net()
    origin = snapshot(model)
    names = list(origin)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 7))
    assert reinit(model, names, generator(), origin) == []
    after = model.state_dict()
    assert not any(bool((tensor == 7).any()) for tensor in after.values())
    ones = ["1.weight", "1.running_var", "2.weight"]
    assert all(bool((after[name] == 1).all()) for name in ones)
    zeros = ["1.bias", "1.running_mean", "1.num_batches_tracked", "2.bias", "4.in_proj_bias", "4.out_proj.bias"]
    assert not any(bool(after[name].any()) for name in zeros if name != "4.out_proj.bias")
    bounds = {"0.bias": 27**-0.5, "3.bias": 4**-0.5}
    for name, bound in bounds.items():
        assert not torch.equal(after[name], origin[name])
        assert float(after[name].abs().max()) <= bound


@pytest.mark.parametrize("reinit", [*LAWS, Rewind(), Random()], ids=str)
def test_draws_depend_on_the_generator_alone(reinit) -> None:
    origin = snapshot(net())
    draws = []
    for seed, names in [(1, list(origin)), (1, list(reversed(origin))), (2, list(origin))]:
        model = net()
        objects = dict(model.named_parameters())
        torch.manual_seed(100 + len(draws))
        state = torch.get_rng_state()
        reinit(model, names, generator(seed), origin, {"0.weight": origin["0.weight"] > 0})
        assert torch.equal(torch.get_rng_state(), state)
        assert all(objects[name] is parameter for name, parameter in model.named_parameters())
        draws.append(snapshot(model))
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in origin)
    assert isinstance(reinit, Rewind) or not torch.equal(draws[0]["0.weight"], draws[2]["0.weight"])


@pytest.mark.parametrize("reinit", LAWS, ids=str)
def test_layers_draw_independently_and_only_the_named_ones(reinit) -> None:
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(3)])
    first = torch.randn(20, 20, generator=generator())
    untouched = model[2].weight.detach().clone()
    reinit(model, ["0.weight", "1.weight"], generator(), {"0.weight": first, "1.weight": first})
    assert not torch.equal(model[0].weight, model[1].weight)
    assert torch.equal(model[2].weight, untouched)


@pytest.mark.parametrize("reinit", LAWS, ids=str)
def test_layers_with_few_or_no_survivors(reinit) -> None:
    layer = nn.Linear(3, 2)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    reinit(layer, ["weight"], generator(), {"weight": torch.ones(2, 3)}, {"weight": mask})
    assert not layer.weight.any()
    mask[1, 1] = True
    reinit(layer, ["weight"], generator(), {"weight": torch.full((2, 3), 0.25)}, {"weight": mask})
    assert layer.weight.flatten().nonzero().tolist() == [[4]]
    assert bool(layer.weight.isfinite().all())
    if isinstance(reinit, KeepDistribution):
        assert layer.weight[1, 1].item() == 0.25


def test_a_weight_of_a_single_entry_is_drawn_too() -> None:
    layer = nn.Linear(1, 1)
    KeepDistribution()(layer, ["weight"], generator(), {"weight": torch.tensor([[9.0]])})
    assert layer.weight.item() == 9


@pytest.mark.parametrize("reinit", LAWS, ids=str)
def test_the_padding_row_of_an_embedding_stays_zero(reinit) -> None:
    table = nn.Embedding(50, 4, padding_idx=7)
    reinit(table, ["weight"], generator(), {"weight": table.weight.detach().clone()})
    assert (table.weight == 0).all(1).nonzero().tolist() == [[7]]
    assert int((table.weight == 0).sum()) == 4


@pytest.mark.parametrize("reinit", LAWS, ids=str)
def test_half_precision(reinit) -> None:
    layer = nn.Linear(30, 30).bfloat16()
    first = layer.weight.detach().clone()
    reinit(layer, ["weight"], generator(), {"weight": first})
    assert layer.weight.dtype == torch.bfloat16
    assert bool(layer.weight.isfinite().all())
    assert not torch.equal(layer.weight, first)


def test_tied_weights_are_drawn_once() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(6, 5), "head": nn.Linear(5, 6)})
    model["head"].weight = model["table"].weight
    first = torch.randn(6, 5, generator=generator())
    origin = {name: first for name in ("table.weight", "head.weight")}
    results = []
    for names in (["table.weight"], ["head.weight"], ["table.weight", "head.weight"]):
        KeepDistribution()(model, names, generator(), origin)
        results.append(model["table"].weight.detach().clone())
    assert torch.equal(results[0].flatten().sort().values, first.flatten().sort().values)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_has_no_reset_is_kept_and_told() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

    model = nn.Sequential(Own(), nn.Linear(2, 2))
    origin = {"0.weight": torch.zeros(3, 3), "1.weight": torch.ones(2, 2)}
    assert KeepSign()(model, list(origin), generator(), origin) == ["0.weight"]
    assert bool((model[0].weight == 1).all())


def test_rewinding() -> None:
    model = net()
    origin = snapshot(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 7))
    mask = origin["0.weight"] > 0
    assert Rewind()(model, list(origin), generator(), origin, {"0.weight": mask}) == []
    after = snapshot(model)
    assert all(torch.equal(after[name], origin[name]) for name in origin if name != "0.weight")
    assert torch.equal(after["0.weight"], origin["0.weight"] * mask)


def test_rewinding_tells_the_buffers_it_does_not_know() -> None:
    model = net()
    origin = {"1.weight": torch.full((4,), 3.0)}
    assert Rewind()(model, ["1.weight", "1.running_var"], generator(), origin) == ["1.running_var"]
    assert bool((model[1].weight == 3).all())


@pytest.mark.parametrize("reinit", [*LAWS, Rewind()], ids=str)
def test_bad_input_is_named_and_changes_nothing(reinit) -> None:
    model = net()
    before, names = snapshot(model), ["0.weight", "1.weight", "3.weight"]
    short = {name: before[name] for name in ("0.weight", "1.weight")}
    wrong = [
        (names, None, None, r"0\.weight"),
        (names, short, None, r"none for 3\.weight\."),
        (names, {**before, "3.weight": torch.ones(2, 9)}, None, r"3\.weight of shape \[2, 4\].*\[2, 9\]"),
        (names, before, {"3.weight": torch.ones(2, 4)}, r"3\.weight: .*bool of shape \[2, 4\].*float32"),
        (names, before, {"3.weight": torch.ones(2, 3) > 0}, r"3\.weight: .*\[2, 4\].*\[2, 3\]"),
        ([*names, "9.weight"], before, None, r"9\.weight: the network has no tensor"),
    ]
    for wanted, origin, kept, message in wrong:
        with pytest.raises(PruneError, match=message):
            reinit(model, wanted, generator(), origin, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mistyped_choices() -> None:
    with pytest.raises(ConfigurationError, match="unknown how 'permut': did you mean 'permute'"):
        KeepDistribution("permut")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"unknown per 'channel'.*'layer', 'filter'"):
        KeepDistribution(per="channel")  # type: ignore[arg-type]


def test_a_law_of_ones_own_sees_the_survivors_only() -> None:
    seen = []

    class Own(WeightLaw):
        def draw(self, survivors, generator):
            seen.append(survivors)
            return survivors.initial + 1

    layer = nn.Linear(2, 2)
    mask = torch.tensor([[True, False], [True, True]])
    origin = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    Own()(layer, ["weight"], generator(), origin, {"weight": mask})
    assert layer.weight.tolist() == [[2.0, 0.0], [4.0, 5.0]]
    assert seen[0].initial.tolist() == [1.0, 3.0, 4.0]
    assert seen[0].filters.tolist() == [0, 1, 1]
    assert len(seen[0].fresh) == 3
