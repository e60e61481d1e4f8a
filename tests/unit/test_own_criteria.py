"""Mistakes in criteria of the user's own are told, not passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_prune import (
    ChannelPruning,
    ConfigurationError,
    Criterion,
    Linear,
    OneShot,
    PruneError,
    WeightCriterion,
    WeightPruning,
)
from lightning_prune.criteria.base import entries
from tests.fits import fit, small_net


class Weights(WeightCriterion):
    def __init__(self, change):
        self.change = change

    def score(self, weights, source, generator):
        return {
            name: self.change(name, weight.abs())
            for name, weight in weights.items()
            if self.change(name, weight) is not None
        }


class Channels(Criterion):
    def __init__(self, score):
        self.of = score

    def score(self, group, tensors, gradients, generator):
        return self.of(group, gradients)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, w: None if name == "net.4.weight" else w, "Weights has given no scores of net.4.weight"),
        (lambda name, w: w.sum(0), r"'net.0.weight' by Weights are of shape \[2, 3, 3\].*shapes, here \[12, 2, 3, 3\]"),
        (lambda name, w: w.tolist(), "'net.0.weight' by Weights are of type list"),
    ],
)
def test_scores_of_weights_are_checked(change, words):
    with pytest.raises(PruneError, match=words):
        fit(WeightPruning(Weights(change), remove=0.5, schedule=OneShot(1, "step")))


def test_scores_of_channels_are_checked():
    criterion = Channels(lambda group, gradients: [1.0] * group.width)
    with pytest.raises(PruneError, match=r"are of type list\. A criterion must return a tensor of shape"):
        fit(ChannelPruning(criterion, remove=0.5, schedule=OneShot(1, "step")))


def test_gradients_that_were_not_asked_for_are_told():
    criterion = Channels(lambda group, gradients: entries(group.slots[:1], gradients).sum(1))
    with pytest.raises(PruneError, match="None were taken: for that the criterion needs batches of at least 1"):
        fit(ChannelPruning(criterion, remove=0.5, schedule=OneShot(1, "step")))


def test_zeros_one_by_one_are_warned_of():
    module = small_net()
    fit(WeightPruning(remove=0.8, schedule=OneShot(1, "step"), shrink="never"), module=module)
    with pytest.warns(UserWarning, match=r"80% of the weights are zero one by one.*single weights in the last"):
        fit(ChannelPruning(remove=0.3, schedule=OneShot(1, "step")), module=module)


def test_two_that_decide_are_told_the_order():
    with pytest.raises(ConfigurationError, match="channels first, as nothing keeps single weights off"):
        fit(WeightPruning(), ChannelPruning())


def test_no_warning_of_tensors_that_begin_at_zero(recwarn):
    module = small_net()
    torch.nn.init.zeros_(module.net[4].weight)
    fit(ChannelPruning(remove=0.3, schedule=OneShot(1, "step")), module=module)
    assert not [warning for warning in recwarn if "one by one" in str(warning.message)]


class Halves(ChannelPruning):
    def scores(self, network):
        return {name: torch.arange(group.width) for name, group in list(network.graph.groups.items())[1:]}


def test_scores_of_a_method_of_ones_own_are_checked():
    with pytest.raises(PruneError, match=r"Halves\.scores has given none for net\.0\. It must score every"):
        fit(Halves(remove=0.5, schedule=OneShot(1, "step")))


def test_the_method_of_the_readme(tmp_path):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    code = next(part for part in text.split("```python\n") if "class SteadyNorms" in part).partition("```")[0]
    found = {}
    exec(code, found)
    callback = found["SteadyNorms"](remove=0.5, of="channels", schedule=Linear(2, 10, 4, "step"))
    assert fit(callback, default_root_dir=tmp_path) is not None
    assert callback.report.reached == pytest.approx(0.5, abs=0.03)
    assert [len(norms) for norms in callback.per_unit["norms"].values()] == [g.after for g in callback.report.groups]
