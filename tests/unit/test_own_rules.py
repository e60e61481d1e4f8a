"""Rules for operators of the user's own that cannot be used, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import Call, register_rule, trace
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.rules import _USER_RULES

SWISH = "lightning_prune_tests::own_swish"


@pytest.fixture
def swish():
    """An operator of the user's own; rules that a test registers are taken away again."""

    @torch.library.custom_op(SWISH, mutates_args=())
    def own_swish(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    before = dict(_USER_RULES)
    yield own_swish
    _USER_RULES.clear()
    _USER_RULES.update(before)


class Net(nn.Module):
    """Two layers with the operator between them."""

    def __init__(self, operator):
        super().__init__()
        self.a, self.b, self.operator = nn.Linear(4, 8), nn.Linear(8, 3), operator

    def forward(self, x):
        return self.b(self.operator(self.a(x)))


def reason(operator):
    """Why the channels that enter the operator stay whole; None if they do not."""
    return dict(trace(Net(operator), torch.randn(5, 4)).refused).get("a.weight (dim 0)")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (lambda call: None, "returned None, not"),
        (lambda call: call.tensors[0], "returned a Tensor, not"),
        (lambda call: call.planes(call.tensors[0]), "returned a tuple of 1 (Plane), not"),
        (lambda call: [], "returned an empty list, not"),
        (lambda call: [call.planes(call.tensors[0])] * 2, "returned a list of 2 (tuple, tuple), not"),
        (lambda call: [call.tensors[0]], "returned a list of 1 (Tensor), not"),
    ],
)
def test_what_a_rule_returned_is_told_where_it_is_of_no_use(swish, rule, told) -> None:
    register_rule(SWISH, rule)
    assert reason(swish).startswith(f"the rule for {SWISH} {told} one tuple of planes for each output")


def test_a_rule_that_returns_planes_is_followed(swish) -> None:
    def passes(call: Call):
        return [call.planes(call.tensors[0])]

    register_rule(SWISH, passes)
    assert reason(swish) is None
    assert list(trace(Net(swish), torch.randn(5, 4)).groups) == ["a"]


def test_a_rule_for_a_name_that_torch_does_not_know_is_told_where_it_would_have_been_needed(swish) -> None:
    register_rule(f"{SWISH}.default", lambda call: [call.planes(call.tensors[0])])
    assert f"operator {SWISH} has no rule; torch knows no '{SWISH}.default', which was given one" in reason(swish)


@pytest.mark.parametrize("name", ["swish", "::swish", "my_ops::"])
def test_a_name_must_be_qualified(name) -> None:
    with pytest.raises(ConfigurationError, match="is no qualified name of an operator, such as 'my_ops::swish'"):
        register_rule(name, lambda call: [])
    assert name not in _USER_RULES


def test_a_rule_must_be_callable() -> None:
    with pytest.raises(ConfigurationError, match="the rule for my_ops::other is a list, but must be a function"):
        register_rule("my_ops::other", [])
