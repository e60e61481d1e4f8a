"""In mixed precision a cut is proven in that of the weights, where it shows what half precision hides."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_prune import register_rule
from lightning_prune.graph import rules
from lightning_prune.graph.observation import is_exact
from tests.fits import SmallNet, fit, pruning, widths

NAME = "test_mixed_precision::faint"


@torch.library.custom_op(NAME, mutates_args=())
def faint(x: torch.Tensor) -> torch.Tensor:
    """Depends a little on all channels together."""
    return x * (1 + 0.05 * x.mean(1, keepdim=True))


@faint.register_fake
def _(x):
    return torch.empty_like(x)


faint.register_autograd(lambda context, gradient: gradient)


class Faint(SmallNet):
    """Has an operator whose rule is wrong by a few percent."""

    def forward(self, images):
        return self.net[5:](faint(self.net[:5](images)))


@pytest.fixture
def wrong_rule():
    register_rule(NAME, lambda call: [call.planes(call.tensors[0])])
    yield
    del rules._USER_RULES[NAME]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_wrong_rule_does_no_harm_in_mixed_precision_either(wrong_rule, precision):
    torch.manual_seed(0)
    callback = pruning(include=["net.4"], remove=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, _ = fit(callback, module=Faint(), epochs=2, precision=precision)
    assert widths(module)[2] == 24
    assert any("cutting net.4 is not exact" in str(warning.message) for warning in caught)


def test_the_users_own_half_precision_is_allowed_for():
    class Half(SmallNet):
        def forward(self, images):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(images).float()

    torch.manual_seed(0)
    module, _ = fit(pruning(scope="group"), module=Half(), epochs=2, precision="bf16-mixed")
    assert widths(module) == [6, 12, 12]


def test_a_network_that_runs_in_mixed_precision_only_is_proven_in_it():
    class MixedOnly(SmallNet):
        def forward(self, images):
            return self.net(images.to(torch.bfloat16)).float()

    torch.manual_seed(0)
    module, _ = fit(pruning(scope="group"), module=MixedOnly(), epochs=2, precision="bf16-mixed")
    assert widths(module) == [6, 12, 12]
    assert not is_exact()


def test_training_itself_stays_in_mixed_precision():
    mixed = []

    class Seen(SmallNet):
        def training_step(self, batch, batch_idx):
            mixed.append(torch.is_autocast_enabled("cpu"))
            return super().training_step(batch, batch_idx)

    fit(pruning(), module=Seen(), epochs=2, precision="bf16-mixed")
    assert False in mixed  # where the cut was proven
    assert mixed[-1]
