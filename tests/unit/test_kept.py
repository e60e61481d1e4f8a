"""Which channels are left, by their numbers before any pruning."""

from __future__ import annotations

import pytest
import torch

from lightning_prune import ConfigurationError, GrowAndPrune, Linear
from tests.fits import fit, loader, pruning, small_net, trainer


@pytest.mark.parametrize("shrink", ["rounds", "end", "never"])
def test_the_numbers_are_those_of_the_first_network(shrink):
    """Without training the weights that are left are those of the channels that are left."""
    module = small_net()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() == 1)  # something is trained
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    callback = pruning(remove=0.6, schedule=Linear(1, 5, 2, "step"), shrink=shrink)
    fit(callback, module=module)
    kept = callback.kept
    assert [len(kept[group.name]) for group in callback.report.groups] == [
        group.after for group in callback.report.groups
    ]
    assert len(callback.report.history) == 3
    first, last = module.net[0].weight.detach(), module.net[4].weight.detach()
    rows, columns = kept["net.4"], kept["net.0"]
    if shrink == "never":
        first, last = first[columns], last[rows][:, columns]
    assert torch.equal(first, before["net.0.weight"][columns])
    assert torch.equal(last, before["net.4.weight"][rows][:, columns])


def test_a_resumed_fit_knows_them(tmp_path):
    callback = pruning(schedule=Linear(1, 8, 7, "step"))
    whole = trainer(callback, epochs=2, default_root_dir=tmp_path)
    whole.fit(small_net(), loader())
    stopped = pruning(schedule=Linear(1, 8, 7, "step"))
    first = trainer(stopped, epochs=2, max_steps=4, default_root_dir=tmp_path)
    first.fit(small_net(), loader())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = pruning(schedule=Linear(1, 8, 7, "step"))
    trainer(resumed, epochs=2, default_root_dir=tmp_path).fit(
        small_net(), loader(), ckpt_path=tmp_path / "stopped.ckpt"
    )
    assert callback.kept.keys() == resumed.kept.keys()
    assert all(torch.equal(units, resumed.kept[name]) for name, units in callback.kept.items())


def test_what_has_grown_has_the_number_of_what_it_was_copied_from():
    callback = GrowAndPrune(remove=0.5, of="channels", expand=1.5, start=0.2, end=0.6, interval=0.2)
    fit(callback, epochs=5)
    for group in callback.report.groups:
        assert len(callback.kept[group.name]) == group.after
        assert set(callback.kept[group.name].tolist()) <= set(range(group.before))


def test_there_are_none_before_a_fit():
    with pytest.raises(ConfigurationError, match="before a fit"):
        _ = pruning().kept
