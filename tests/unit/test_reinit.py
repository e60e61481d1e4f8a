from __future__ import annotations

from typing import get_args

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

import lightning_prune
from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.reinit import (
    Keep,
    KeepDistribution,
    KeepMagnitude,
    KeepSign,
    KeepSignAndDistribution,
    Random,
    Reinit,
    ReinitName,
    Rewind,
    reinit_from,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Own(nn.Module):
    """A module with a weight that no one knows how to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Renewing(nn.Module):
    """A module whose reset makes a new parameter, as some users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.full((3,), 7.0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    built = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), Own(), Renewing())
    with torch.no_grad():
        for tensor in built.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 5))
    return built


def changed(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not bool((tensor == 5).all())}


def test_only_the_named_tensors_are_redrawn() -> None:
    model = net()
    assert Random()(model, ["0.weight", "1.running_mean", "2.bias"], generator()) == []
    assert changed(model) == {"0.weight", "1.running_mean", "2.bias"}
    assert model.state_dict()["1.running_mean"].tolist() == [0.0] * 4


def test_the_draw_has_the_law_of_the_module_at_its_present_size() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(400, 300)
    with torch.no_grad():
        layer.weight.set_(torch.full((300, 25), 9.0))
    Random()(layer, ["weight"], generator())
    assert layer.weight.shape == (300, 25)
    assert float(layer.weight.detach().abs().max()) == pytest.approx(1 / 5, rel=0.01)


def test_parameters_keep_their_identity_even_if_the_reset_replaces_them() -> None:
    model = net()
    before = dict(model.named_parameters())
    pointers = {name: parameter.data_ptr() for name, parameter in before.items()}
    Random()(model, ["0.weight", "4.weight"], generator())
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert {name: parameter.data_ptr() for name, parameter in after.items()} == pointers
    assert changed(model) == {"0.weight", "4.weight"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in after.values())


def test_what_has_no_reset_is_kept_and_told() -> None:
    model = net()
    assert Random()(model, ["3.weight", "2.weight"], generator()) == ["3.weight"]
    assert changed(model) == {"2.weight"}


def test_children_of_a_module_with_a_reset_are_left_alone() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.zeros(2))

        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight)
            self.inner.reset_parameters()

    parent = Parent()
    inner = parent.inner.weight.clone()
    assert Random()(parent, ["weight"], generator()) == []
    assert torch.equal(parent.inner.weight, inner)
    assert bool(parent.weight.any())


def test_the_draw_comes_from_the_generator_and_leaves_the_global_state_alone() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + len(draws))
        state = torch.get_rng_state()
        layer = nn.Linear(3, 3)
        torch.set_rng_state(state)
        Random()(layer, ["weight"], generator(seed))
        assert torch.equal(torch.get_rng_state(), state)
        draws.append(layer.weight.detach())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(PruneError, match=r"9\.weight"):
        Random()(net(), ["9.weight"], generator())


def test_keep_changes_nothing() -> None:
    model = net()
    assert Keep()(model, list(model.state_dict()), generator()) == []
    assert changed(model) == set()


def test_entries_that_are_not_kept_are_zero() -> None:
    model = net()
    kept = {"0.bias": torch.tensor([True, False, True, False]), "3.weight": torch.tensor([True, True, False])}
    assert Random()(model, ["0.bias", "3.weight"], generator(), kept={**kept, "2.bias": torch.zeros(2) > 0}) == [
        "3.weight"
    ]
    assert (model[0].bias != 0).tolist() == [True, False, True, False]
    assert model[3].weight.tolist() == [5.0, 5.0, 0.0]
    assert changed(model) == {"0.bias", "3.weight"}


def test_a_module_at_two_places_is_found_by_either_name() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "second": layer})
    before = layer.weight.detach().clone()
    assert Random()(model, ["second.weight"], generator()) == []
    assert not torch.equal(layer.weight, before)


def test_attention_is_redrawn() -> None:
    attention = nn.MultiheadAttention(4, 2)
    before = attention.in_proj_weight.detach().clone()
    output = attention.out_proj.weight.detach().clone()
    assert Random()(attention, ["in_proj_weight", "in_proj_bias"], generator()) == []
    assert not torch.equal(attention.in_proj_weight, before)
    assert torch.equal(attention.out_proj.weight, output)


METHODS = {
    "keep": Keep,
    "rewind": Rewind,
    "random": Random,
    "sign": KeepSign,
    "distribution": KeepDistribution,
    "magnitude": KeepMagnitude,
    "sign+distribution": KeepSignAndDistribution,
}


@pytest.mark.parametrize("name", get_args(ReinitName))
def test_every_name_has_its_method(name) -> None:
    assert reinit_from(name) == METHODS[name]()
    assert METHODS[name].needs_origin == (name not in ("keep", "random"))
    assert METHODS[name].provenance


def test_all_methods_have_a_name() -> None:
    assert set(METHODS) == set(get_args(ReinitName))


def test_reconstructions_are_called_so() -> None:
    rebuilt = {name for name, method in METHODS.items() if "reconstruction" in method.provenance}
    assert rebuilt == {"sign", "distribution", "magnitude"}


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m is not Random], ids=lambda method: method.__name__)
def test_methods_are_public(method) -> None:
    assert getattr(lightning_prune, method.__name__) is method


def as_written(reinit):
    """What becomes of a reinit that is given to a parser of YAML, and of the YAML that it prints."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reinit", type=ReinitName | Reinit)
    first = parser.parse_object({"reinit": reinit})
    second = parser.parse_string(parser.dump(first))
    assert parser.dump(second) == parser.dump(first)
    return parser.instantiate(second).reinit


@pytest.mark.parametrize("name", get_args(ReinitName))
def test_names_in_yaml(name) -> None:
    assert as_written(name) == name


def test_objects_in_yaml() -> None:
    options = {"how": "kernel", "per": "filter", "sign_conditional": True}
    entry = {"class_path": "lightning_prune.KeepDistribution", "init_args": options}
    assert as_written(entry) == KeepDistribution("kernel", "filter", True)
    for method in set(METHODS.values()) - {Random}:
        assert as_written({"class_path": f"lightning_prune.{method.__name__}"}) == method()
    with pytest.raises(ArgumentError, match="'permute', 'bootstrap', 'kernel', 'normal'"):
        as_written({**entry, "init_args": {"how": "permut"}})


def test_names() -> None:
    own = Random()
    assert reinit_from(own) is own
    with pytest.raises(ConfigurationError, match="did you mean 'random'"):
        reinit_from("rnadom")  # type: ignore[arg-type]
